"""Repeat a passage that was read some hundred tokens ago, given its first tokens."""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from retention_gates.data.tasks.base import Filler, Split, Task, TaskExample, check_depth

PASSAGE_TOKENS = 96
CUE_TOKENS = 16


@dataclass(frozen=True)
class PassageRepeat(Task):
    """96 tokens of a text stand somewhere in the first half of it; their first 16 come again at the end.

    Args:
        depth: where they stand instead, 0 (the text's beginning) to 1 (just before they come again).
    """

    kind: ClassVar[str] = "passage_repeat"
    depth: float | None = None

    def __post_init__(self) -> None:
        check_depth(self.kind, self.depth)

    def build(self, filler: Filler, rng: np.random.Generator, length: int, split: Split) -> TaskExample:
        gap = filler.encode("\n\n")
        room = self.filler_room(length, len(filler.prefix) + 2 * PASSAGE_TOKENS + len(gap))
        # Passage and filler are one window: the passage can't be told from its surroundings until it is asked for.
        text = filler.window(rng, room + PASSAGE_TOKENS)
        start = int(rng.integers(room // 2 + 1)) if self.depth is None else round(self.depth * room)
        passage = text[start : start + PASSAGE_TOKENS]
        prompt = filler.prefix + text + gap + passage[:CUE_TOKENS]
        return TaskExample(prompt, passage[CUE_TOKENS:], {"passage_start": len(filler.prefix) + start})
