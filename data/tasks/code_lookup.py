"""Look up the number that belongs to a name, among several scattered over a text."""

from itertools import pairwise

import numpy as np

from retention_gates.data.tasks.base import Filler, Split, Task, TaskExample, draw_code, encode_after_space

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
STATEMENTS = 4
STATEMENT = "\n\nThe telephone number of {} is"


class CodeLookup(Task):
    """Four statements "The telephone number of NAME is 12345." stand scattered over a text; one is asked at the end.

    In training rows all of them are asked, in another order: four times the signal for the same row.
    """

    name = "code_lookup"

    def build(self, filler: Filler, rng: np.random.Generator, length: int, split: Split) -> TaskExample:
        prompt, asked = self._scatter(filler, rng, length, split, ask=1)
        name, code, question, answer = asked[0]
        return TaskExample(prompt + question, answer, {"name": name, "code": code})

    def build_for_training(self, filler: Filler, rng: np.random.Generator, length: int) -> list[int]:
        row, asked = self._scatter(filler, rng, length, "train", ask=STATEMENTS)
        end = filler.encode(".")
        for _, _, question, answer in asked:
            row = row + question + answer + end
        return row

    def _scatter(
        self, filler: Filler, rng: np.random.Generator, length: int, split: Split, ask: int
    ) -> tuple[list[int], list[tuple[str, str, list[int], list[int]]]]:
        """The text with all statements in it, and name, code, question and answer of those to be asked.

        The text leaves room for the questions and answers (each with a full stop if all are asked).
        """
        names = [str(name) for name in rng.choice(NAMES[split], STATEMENTS, replace=False)]
        entries = []
        for name in names:
            code = draw_code(rng, split)
            entries.append((name, code, *encode_after_space(filler, STATEMENT.format(name), code)))
        end, close = filler.encode("."), filler.encode(".\n\n")
        statements = [question + answer + close for _, _, question, answer in entries]
        asked = [entries[i] for i in rng.permutation(STATEMENTS)[:ask]]
        stops = len(end) * (ask if ask > 1 else 0)
        used = sum(map(len, statements)) + sum(len(q) + len(a) for _, _, q, a in asked) + stops
        room = self.filler_room(length, len(filler.prefix) + used, least=16 * STATEMENTS)
        text = filler.window(rng, room)
        # None stands in the last quarter: what a window of recent tokens holds anyway says nothing about a memory.
        cuts = [0, *sorted(rng.integers(0, room * 3 // 4 + 1, size=STATEMENTS).tolist()), room]
        row = list(filler.prefix)
        for (start, stop), statement in zip(pairwise(cuts), [*statements, []], strict=True):
            row += text[start:stop] + statement
        return row, asked
