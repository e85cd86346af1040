"""Finish a sentence that was read before, given its first words."""

import re
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from retention_gates.data.tasks.base import Filler, Split, Task, TaskExample, check_depth

CUE_WORDS = 18
ANSWER_WORDS = range(5, 21)
ATTEMPTS = 64
# From a letter to the next full stop, inside one paragraph and free of Markdown's marks.
SENTENCE = re.compile(r"[^\W\d_](?:[^.!?*_#\n]|\n(?!\s*\n))*[.!?]")


@dataclass(frozen=True)
class SentenceRecall(Task):
    """A long sentence stands somewhere in a text; its first 18 words come again at the end, the rest is the answer.

    Args:
        depth: where it stands instead, 0 (the text's beginning) to 1 (just before its words come again).
    """

    kind: ClassVar[str] = "sentence_recall"
    depth: float | None = None

    def __post_init__(self) -> None:
        check_depth(self.kind, self.depth)

    def build(self, filler: Filler, rng: np.random.Generator, length: int, split: Split) -> TaskExample:
        gap = filler.encode("\n\n")
        self.filler_room(length, len(filler.prefix) + len(gap), least=8 * CUE_WORDS)
        for _ in range(ATTEMPTS):
            text = filler.decode(filler.window(rng, length))
            end = len(text) // 2 if self.depth is None else len(text)
            sentences = [match.span() for match in SENTENCE.finditer(text, 0, end) if _fits(match, text)]
            if not sentences:
                continue
            start, stop = sentences[int(rng.integers(len(sentences)))]
            answer_start = start + _cue_length(text[start:stop])
            # Each part is tokenised apart, so that the sentence is the same tokens both times.
            cue, answer = filler.encode(text[start:answer_start]), filler.encode(text[answer_start:stop])
            before, after = filler.encode(text[:start]), filler.encode(text[stop:])
            room = length - len(filler.prefix) - len(gap) - 2 * (len(cue) + len(answer))
            least = max(room - len(before), min(room // 2, len(after)), 0)
            most = min(room, len(after))
            if room < 16 or least > most:
                continue
            if self.depth is None:
                behind = int(rng.integers(least, most + 1))
            else:
                behind = round((1 - self.depth) * room)
                if not room - len(before) <= behind <= len(after):
                    continue  # another window, with a sentence that has as much text on either side
            ahead = before[len(before) - (room - behind) :]
            prompt = filler.prefix + ahead + cue + answer + after[:behind] + gap + cue
            meta = {"sentence": text[start:stop], "position": len(filler.prefix) + len(ahead)}
            return TaskExample(prompt, answer, meta)
        raise ValueError(
            f"found no sentence of {CUE_WORDS + ANSWER_WORDS.start} to {CUE_WORDS + ANSWER_WORDS.stop - 1} words in "
            f"{ATTEMPTS} windows of {length} tokens; choose longer rows, filler in whole sentences, or another task "
            "such as 'passage_repeat'"
        )


def _fits(match: re.Match[str], text: str) -> bool:
    sentence = match.group()
    if len(sentence.split()) - CUE_WORDS not in ANSWER_WORDS:
        return False
    return text.count(sentence[: _cue_length(sentence)]) == 1


def _cue_length(sentence: str) -> int:
    """Characters of the first 18 words; the space behind them belongs to the answer."""
    return list(re.finditer(r"\s+", sentence))[CUE_WORDS - 1].start()
