"""Eviction in plain Python, one head at a time: what the tensor code has to agree with exactly."""

from dataclasses import dataclass, field

import numpy as np


@dataclass
class PlainHead:
    """One KV head of one row. Priorities are float32 products, as on the device."""

    budget: int
    linear_in_age: bool = True
    buffer_size: int = 1
    recent: int = 0
    held: dict[int, float] = field(default_factory=dict)  # position -> score
    protected: set[int] = field(default_factory=set)

    def read(self, scores: list[float], columns: list[int], valid: list[bool]) -> list[set[int]]:
        """Reads a chunk of tokens; gives what each token of it sees, itself included."""
        before = set(self.held)
        seen = []
        for score, column, is_real in zip(scores, columns, valid, strict=True):
            if is_real:
                self.held[column] = score
            seen.append(before | {position for position in self.held if position <= column})
        if len(self.held) >= self.budget + self.buffer_size:
            self._evict(columns[-1])
        return seen

    def _evict(self, step: int) -> None:
        candidates = []
        for position, score in self.held.items():
            age = step - position
            if position not in self.protected and age >= self.recent:
                product = np.float32(age) * np.float32(score) if self.linear_in_age else np.float32(score)
                candidates.append((product, position))
        surplus = len(self.held) - self.budget
        assert len(candidates) >= surplus
        for _, position in sorted(candidates)[:surplus]:
            del self.held[position]
