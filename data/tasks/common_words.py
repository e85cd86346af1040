"""Find the words that a list repeats most often."""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from retention_gates.data.tasks.base import Filler, Split, Task, TaskExample, check_setting, encode_list

CONSONANTS: dict[Split, str] = {"train": "bdgkmp", "test": "flnrtv"}
VOWELS = "aeiou"
INSTRUCTION = "Some words of this list come up more often than the others. Remember them.\n"


@dataclass(frozen=True)
class CommonWords(Task):
    """A list of invented words in which a few come up far more often than all others; these are asked for.

    The answer names them in the order in which they first come up. After: RULER's common words extraction,
    arXiv 2404.06654, which has ten of them, thirty times each among words that come up three times, as a numbered
    list of English words, and in which any order is right. The longer the list, the more rare words it has.

    Args:
        common: how many words are common, 1 to 10.
        repeats: how often each of them comes up, 2 to 30.
        rare_repeats: how often each other word comes up, below `repeats`.
    """

    kind: ClassVar[str] = "common_words"
    common: int = 3
    repeats: int = 12
    rare_repeats: int = 2

    def __post_init__(self) -> None:
        check_setting(self.kind, "common", self.common, 1, 10)
        check_setting(self.kind, "repeats", self.repeats, 2, 30)
        check_setting(self.kind, "rare_repeats", self.rare_repeats, 1, self.repeats - 1)

    def build(self, filler: Filler, rng: np.random.Generator, length: int, split: Split) -> TaskExample:
        taken: set[str] = set()
        words = [_draw_word(rng, split, taken) for _ in range(self.common)]
        entries = [(word, filler.encode(f" {word},")) for word in words for _ in range(self.repeats)]
        question, answer = encode_list(filler, "\n\nThe words that came up most often:", words)
        head = filler.prefix + filler.encode(INSTRUCTION)
        used = len(head) + sum(len(ids) for _, ids in entries) + len(question) + len(answer)
        room = self.filler_room(length, used, least=64)
        while True:
            word = _draw_word(rng, split, taken)
            ids = filler.encode(f" {word},")
            if room < len(ids) * self.rare_repeats:
                break
            entries += [(word, ids)] * self.rare_repeats
            room -= len(ids) * self.rare_repeats
        entries = [entries[i] for i in rng.permutation(len(entries))]
        listed = [token for _, ids in entries for token in ids]
        words.sort(key=[word for word, _ in entries].index)
        question, answer = encode_list(filler, "\n\nThe words that came up most often:", words)
        before = filler.window(rng, room) if room else []  # what no word was short enough for
        return TaskExample(head + before + listed + question, answer, {"words": words})


def _draw_word(rng: np.random.Generator, split: Split, taken: set[str]) -> str:
    """Two or three syllables of a consonant of the split and a vowel, such as "gamo" or "pidebu"."""
    while True:
        syllables = 2 if len(taken) < 100 else 3
        letters = CONSONANTS[split]
        word = "".join(letters[rng.integers(6)] + VOWELS[rng.integers(5)] for _ in range(syllables))
        if word not in taken:
            taken.add(word)
            return word
