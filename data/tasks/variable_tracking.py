"""Follow a value from variable to variable."""

from dataclasses import dataclass
from itertools import pairwise
from typing import ClassVar

import numpy as np

from retention_gates.data.tasks.base import (
    Filler,
    Split,
    Task,
    TaskExample,
    check_setting,
    draw_code,
    encode_after_space,
    encode_list,
    scatter,
)

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"


@dataclass(frozen=True)
class VariableTracking(Task):
    """Assignments stand scattered over a text: X = 12345, later Y = X, and so on; which variables hold 12345?

    The answer names them in the order in which they were set. After: RULER's variable tracking, arXiv 2404.06654,
    where any order is right.

    Args:
        hops: assignments from variable to variable, 1 to 8.
        chains: values that are passed on, 1 to 8; one is asked for, the others distract.
    """

    kind: ClassVar[str] = "variable_tracking"
    hops: int = 4
    chains: int = 1

    def __post_init__(self) -> None:
        check_setting(self.kind, "hops", self.hops, 1, 8)
        check_setting(self.kind, "chains", self.chains, 1, 8)

    def build(self, filler: Filler, rng: np.random.Generator, length: int, split: Split) -> TaskExample:
        taken: set[str] = set()
        chains: list[tuple[str, list[str]]] = []
        statements: list[list[int]] = []
        for _ in range(self.chains):
            code = draw_code(rng, split)
            names = [_draw_name(rng, split, taken) for _ in range(self.hops + 1)]
            chains.append((code, names))
            said, number = encode_after_space(filler, f"\n\nVAR {names[0]} =", code)
            statements.append(said + number + filler.encode("\n\n"))
            statements += [filler.encode(f"\n\nVAR {new} = VAR {old}\n\n") for old, new in pairwise(names)]
        code, names = chains[0]
        said, number = encode_after_space(filler, "\n\nThe variables that hold", code)
        lead, answer = encode_list(filler, ", in the order in which they were set:", names)
        question = said + number + lead
        used = len(filler.prefix) + sum(map(len, statements)) + len(question) + len(answer)
        room = self.filler_room(length, used)
        # Each chain in its own order, the chains among each other by chance.
        places = np.sort(rng.integers(room * 3 // 4 + 1, size=(self.chains, self.hops + 1)), axis=1).reshape(-1)
        prompt = filler.prefix + scatter(filler.window(rng, room), statements, places.tolist()) + question
        return TaskExample(prompt, answer, {"code": code, "names": names})


def _draw_name(rng: np.random.Generator, split: Split, taken: set[str]) -> str:
    """Five capital letters; a name whose first letter is among the last thirteen is for tests."""
    while True:
        name = "".join(LETTERS[i] for i in rng.integers(26, size=5))
        if (name[0] > "M") == (split == "test") and name not in taken:
            taken.add(name)
            return name
