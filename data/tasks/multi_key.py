"""Look up the number of one key among many that resemble it."""

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
    scatter,
)
from retention_gates.data.tasks.words import ADJECTIVES, NOUNS

STATEMENT = "\n\nThe magic number of the {} is"


@dataclass(frozen=True)
class MultiKey(Task):
    """Numbers of keys such as "old river" stand scattered over a text; one is asked for at the end.

    Keys share adjectives and nouns, so that each is told from the others by both of its words. After: RULER's
    multi-key retrieval, arXiv 2404.06654.

    Args:
        keys: how many there are, 2 to 64.
        depth: where the one that is asked for stands, 0 (the text's beginning) to 1 (just before the question). None:
            anywhere in the first three quarters, as the others do.
    """

    kind: ClassVar[str] = "multi_key"
    keys: int = 8
    depth: float | None = None

    def __post_init__(self) -> None:
        check_setting(self.kind, "keys", self.keys, 2, 64)
        check_depth(self.kind, self.depth)

    def build(self, filler: Filler, rng: np.random.Generator, length: int, split: Split) -> TaskExample:
        keys = self._draw_keys(rng, split)
        codes = [draw_code(rng, split) for _ in keys]
        asked = int(rng.integers(self.keys))
        said = [encode_after_space(filler, STATEMENT.format(key), code) for key, code in zip(keys, codes, strict=True)]
        close = filler.encode(".\n\n")
        statements = [question + answer + close for question, answer in said]
        question, answer = said[asked]
        head = filler.prefix
        room = self.filler_room(length, len(head) + sum(map(len, statements)) + len(question) + len(answer))
        places = rng.integers(room * 3 // 4 + 1, size=self.keys).tolist()
        if self.depth is not None:
            places[asked] = round(self.depth * room)
        prompt = head + scatter(filler.window(rng, room), statements, places) + question
        return TaskExample(prompt, answer, {"key": keys[asked], "code": codes[asked]})

    def _draw_keys(self, rng: np.random.Generator, split: Split) -> list[str]:
        """Pairs of about the square root of `keys` adjectives and as many nouns: each word is in several keys."""
        side = int(np.ceil(np.sqrt(self.keys)))
        adjectives = rng.choice(ADJECTIVES[split], side, replace=False)
        nouns = rng.choice(NOUNS[split], side, replace=False)
        chosen = rng.choice(side * side, self.keys, replace=False)
        return [f"{adjectives[i // side]} {nouns[i % side]}" for i in chosen]
