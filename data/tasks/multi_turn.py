"""Answer several questions about a text, one after the other, with other text between them."""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from retention_gates.data.tasks.base import (
    Filler,
    Span,
    Split,
    Task,
    TaskExample,
    check_setting,
    draw_code,
    encode_after_space,
    scatter,
)
from retention_gates.data.tasks.code_lookup import NAMES

STATEMENT = "\n\nThe telephone number of {} is"
QUESTION = "\n\nQuestion: What is the telephone number of {0}?\nAnswer: The telephone number of {0} is"


@dataclass(frozen=True)
class MultiTurn(Task):
    """Numbers told in the first half are asked for in turns, with equal stretches of text between the turns.

    What a policy throws away after one question is gone for the next: each turn is also scored as a part of its own.

    Args:
        turns: how many questions, 2 to 8.
    """

    kind: ClassVar[str] = "multi_turn"
    turns: int = 3

    def __post_init__(self) -> None:
        check_setting(self.kind, "turns", self.turns, 2, 8)

    def build(self, filler: Filler, rng: np.random.Generator, length: int, split: Split) -> TaskExample:
        names = [str(name) for name in rng.choice(NAMES[split], self.turns, replace=False)]
        codes = [draw_code(rng, split) for _ in names]
        close = filler.encode(".\n\n")
        statements, asked = [], []
        for name, code in zip(names, codes, strict=True):
            said, number = encode_after_space(filler, STATEMENT.format(name), code)
            statements.append(said + number + close)
            asked.append(encode_after_space(filler, QUESTION.format(name), code))
        used = len(filler.prefix) + sum(map(len, statements)) + sum(len(q) + len(a) for q, a in asked)
        used += len(close) * (self.turns - 1)
        room = self.filler_room(length, used, least=16 * (self.turns + 1))
        text = filler.window(rng, room)
        half = room // 2
        places = rng.integers(half * 3 // 4 + 1, size=self.turns).tolist()
        cuts = np.linspace(half, room, self.turns).round().astype(int).tolist()  # [turns], the last is the end
        order = rng.permutation(self.turns).tolist()
        prompt = filler.prefix + scatter(text[:half], statements, places)
        answer: list[int] = []
        parts: dict[str, Span] = {}
        for turn, index in enumerate(order):
            question, number = asked[index]
            if turn == 0:
                prompt = prompt + question
            else:
                answer += close + text[cuts[turn - 1] : cuts[turn]] + question
            answer += number
            parts[f"turn {turn + 1}"] = (len(answer) - len(number), len(answer))
        meta = {"names": [names[i] for i in order], "codes": [codes[i] for i in order]}
        return TaskExample(prompt, answer, meta, parts)
