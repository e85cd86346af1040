"""Look up the number that belongs to a name, among several scattered over a text."""

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

NAMES: dict[Split, tuple[str, ...]] = {
    "train": tuple(
        "Adam Anna Barbara Carl Clara Daniel Diana Edward Ellen Frank George Hannah Henry Helen Jack Jane John "
        "Julia Kevin Laura Louis Maria Martin Mary Michael Nancy Oliver Paul Peter Rachel Robert Rose Samuel Sarah "
        "Simon Sophie Thomas Victor Walter William".split()
    ),
    "test": tuple(
        "Alice Arthur Bruno Carmen Charles David Dorothy Emma Eric Felix Grace Harold Hugo Irene Jacob James Kate "
        "Leon Linda Lucy Mark Nina Oscar Patrick Philip Ruth Stephen Susan Ted Vera".split()
    ),
}
STATEMENT = "\n\nThe telephone number of {} is"


@dataclass(frozen=True)
class CodeLookup(Task):
    """Statements "The telephone number of NAME is 12345." stand scattered over a text; one is asked at the end.

    In training rows all of them are asked, in another order: as many times the signal for the same row.

    Args:
        statements: how many there are, 1 to 16.
        depth: where the one that is asked for stands, 0 (the text's beginning) to 1 (just before the question). None:
            anywhere in the first three quarters, as the others do.
    """

    kind: ClassVar[str] = "code_lookup"
    statements: int = 4
    depth: float | None = None

    def __post_init__(self) -> None:
        check_setting(self.kind, "statements", self.statements, 1, 16)
        check_depth(self.kind, self.depth)

    def build(self, filler: Filler, rng: np.random.Generator, length: int, split: Split) -> TaskExample:
        prompt, asked = self._scatter(filler, rng, length, split, ask=1)
        name, code, question, answer = asked[0]
        return TaskExample(prompt + question, answer, {"name": name, "code": code})

    def build_for_training(self, filler: Filler, rng: np.random.Generator, length: int) -> list[int]:
        row, asked = self._scatter(filler, rng, length, "train", ask=self.statements)
        end = filler.encode(".")
        for _, _, question, answer in asked:
            row = row + question + answer + end
        return row

    def _scatter(
        self, filler: Filler, rng: np.random.Generator, length: int, split: Split, ask: int
    ) -> tuple[list[int], list[tuple[str, str, list[int], list[int]]]]:
        """The text with all statements in it, and name, code, question and answer of those to be asked.

        The text leaves room for the questions and answers (each with a full stop in a training row).
        """
        names = [str(name) for name in rng.choice(NAMES[split], self.statements, replace=False)]
        entries = []
        for name in names:
            code = draw_code(rng, split)
            entries.append((name, code, *encode_after_space(filler, STATEMENT.format(name), code)))
        end, close = filler.encode("."), filler.encode(".\n\n")
        statements = [question + answer + close for _, _, question, answer in entries]
        order = rng.permutation(self.statements)[:ask].tolist()
        asked = [entries[i] for i in order]
        stops = len(end) * (ask if ask > 1 else 0)
        used = sum(map(len, statements)) + sum(len(q) + len(a) for _, _, q, a in asked) + stops
        room = self.filler_room(length, len(filler.prefix) + used, least=16 * self.statements)
        text = filler.window(rng, room)
        # None stands in the last quarter: what a window of recent tokens holds anyway says nothing about a memory.
        places = sorted(rng.integers(0, room * 3 // 4 + 1, size=self.statements).tolist())
        if self.depth is not None:
            places[order[0]] = round(self.depth * room)
        return filler.prefix + scatter(text, statements, places), asked
