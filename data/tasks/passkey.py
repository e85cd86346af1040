"""Find pass keys in noise."""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from retention_gates.data.tasks.base import (
    Filler,
    Span,
    Split,
    Task,
    TaskExample,
    check_depth,
    check_setting,
    draw_code,
    encode_after_space,
    scatter,
)

INSTRUCTION = "There is an important piece of information hidden in the text. Find it and remember it.\n"
NOISE = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."


@dataclass(frozen=True)
class Passkey(Task):
    """A five-digit pass key, said twice in a row inside sentences that repeat; it is asked for at the end.

    The noise is the same everywhere, so that this task shows what a policy does when nearly everything is worthless.
    After: Landmark Attention, arXiv 2305.16300.

    Args:
        needles: pass keys, 1 to 3; several are numbered, and all of them asked for.
        depth: where the first stands, 0 (the beginning) to 1 (just before the question). None: anywhere in the first
            four fifths, as the others do.
    """

    kind: ClassVar[str] = "passkey"
    needles: int = 1
    depth: float | None = None

    def __post_init__(self) -> None:
        check_setting(self.kind, "needles", self.needles, 1, 3)
        check_depth(self.kind, self.depth)

    def build(self, filler: Filler, rng: np.random.Generator, length: int, split: Split) -> TaskExample:
        codes: list[str] = []
        while len(codes) < self.needles:
            code = draw_code(rng, split)
            codes += [code] if code not in codes else []
        named = [f"pass key{f' number {i + 1}' if self.needles > 1 else ''}" for i in range(self.needles)]
        hidden = [self._hide(filler, name, code) for name, code in zip(named, codes, strict=True)]
        question, answer, parts = _ask(filler, named, codes)
        head = filler.prefix + filler.encode(INSTRUCTION)
        room = self.filler_room(length, len(head) + sum(map(len, hidden)) + len(question) + len(answer))
        sentence = filler.encode(" " + NOISE)
        noise = (filler.encode(NOISE) + sentence * (room // len(sentence) + 1))[:room]
        places = rng.integers(room * 4 // 5 + 1, size=self.needles).tolist()  # never just before the question
        if self.depth is not None:
            places[0] = round(self.depth * room)
        prompt = head + scatter(noise, hidden, places) + question
        meta = {"codes": codes, "places": [len(head) + place for place in places]}
        return TaskExample(prompt, answer, meta, parts)

    @staticmethod
    def _hide(filler: Filler, name: str, code: str) -> list[int]:
        said, key = encode_after_space(filler, f" The {name} is", code)
        again, _ = encode_after_space(filler, ". Remember it.", code)
        return said + key + again + key + filler.encode(f" is the {name}.")


def _ask(filler: Filler, named: list[str], codes: list[str]) -> tuple[list[int], list[int], dict[str, Span]]:
    """The question up to the first key; the rest of the answer, and where in it each key stands."""
    if len(codes) == 1:
        question, answer = encode_after_space(filler, "\n\nWhat is the pass key? The pass key is", codes[0])
        return question, answer, {}
    question, answer = encode_after_space(filler, f"\n\nWhat are the pass keys? The {named[0]} is", codes[0])
    parts = {"key 1": (0, len(answer))}
    for index in range(1, len(codes)):
        lead, key = encode_after_space(filler, f". The {named[index]} is", codes[index])
        answer = answer + lead + key
        parts[f"key {index + 1}"] = (len(answer) - len(key), len(answer))
    return question, answer, parts
