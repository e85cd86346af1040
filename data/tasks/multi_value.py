"""Collect all numbers that a text gives for one key."""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from retention_gates.data.tasks.base import (
    Filler,
    Split,
    Task,
    TaskExample,
    check_depth,
    check_setting,
    draw_code,
    encode_after_space,
    encode_list,
    scatter,
)
from retention_gates.data.tasks.words import ADJECTIVES, NOUNS


@dataclass(frozen=True)
class MultiValue(Task):
    """Several numbers of one key stand scattered over a text; all are asked for at the end, in order.

    After: RULER's multi-value retrieval, arXiv 2404.06654, where any order is right.

    Args:
        values: how many there are, 2 to 16.
        depth: where the first stands, 0 (the text's beginning) to 1 (just before the question). None: anywhere in the
            first three quarters, as the others do.
    """

    kind: ClassVar[str] = "multi_value"
    values: int = 4
    depth: float | None = None

    def __post_init__(self) -> None:
        check_setting(self.kind, "values", self.values, 2, 16)
        check_depth(self.kind, self.depth)

    def build(self, filler: Filler, rng: np.random.Generator, length: int, split: Split) -> TaskExample:
        key = f"{rng.choice(ADJECTIVES[split])} {rng.choice(NOUNS[split])}"
        codes = [draw_code(rng, split) for _ in range(self.values)]
        close = filler.encode(".\n\n")
        statements = []
        for code in codes:
            said, number = encode_after_space(filler, f"\n\nOne of the magic numbers of the {key} is", code)
            statements.append(said + number + close)
        head = filler.prefix
        size = sum(map(len, encode_list(filler, self._question(key), codes)))
        room = self.filler_room(length, len(head) + sum(map(len, statements)) + size)
        places = rng.integers(room * 3 // 4 + 1, size=self.values).tolist()
        if self.depth is not None:
            places[0] = round(self.depth * room)
        order = sorted(range(self.values), key=places.__getitem__)
        # The size of the question does not depend on the order: each number is encoded apart.
        question, answer = encode_list(filler, self._question(key), [codes[i] for i in order])
        prompt = head + scatter(filler.window(rng, room), statements, places) + question
        return TaskExample(prompt, answer, {"key": key, "codes": [codes[i] for i in order]})

    @staticmethod
    def _question(key: str) -> str:
        return f"\n\nAll magic numbers of the {key}, in the order in which they were told:"
