"""The answers that a batch is writing: their tokens stay on the device until someone looks."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import numpy as np
import torch


@dataclass(frozen=True)
class Job:
    """A prompt to answer."""

    index: int
    ids: list[int]
    most: int  # tokens of the answer
    seed: tuple[int, ...]  # of its random numbers, if the answer is drawn


class AnswerRows:
    """One answer in every row of a batch. Nothing here waits for the device but `finished`.

    An answer is drawn by one random number per token, which its own seed gives, so that it does not depend on what
    else is in the batch.

    Args:
        most: tokens of the longest answer.
        eos: tokens that end an answer.
        temperature: 0 takes the likeliest token.
    """

    def __init__(self, rows: int, most: int, eos: Collection[int], temperature: float, device: torch.device):
        self.jobs: list[Job | None] = [None] * rows
        self.most, self.temperature, self.device = most, temperature, device
        self.eos = torch.tensor(sorted(eos), dtype=torch.int64, device=device)
        self.tokens = torch.zeros(rows, dtype=torch.int64, device=device)  # the newest of each row
        self.counts = torch.zeros(rows, dtype=torch.int64, device=device)  # tokens written
        self.limits = torch.zeros(rows, dtype=torch.int64, device=device)
        self.prompts = torch.zeros(rows, dtype=torch.int64, device=device)  # tokens of each prompt
        self.has_ended = torch.ones(rows, dtype=torch.bool, device=device)
        self.written = torch.zeros(
            rows, most + 1, dtype=torch.int64, device=device
        )  # the last column is for rows that have ended
        self.chances = torch.zeros(rows, most if temperature else 0, dtype=torch.float64, device=device)

    @property
    def free(self) -> list[int]:
        """Rows without an answer to write."""
        return [row for row, job in enumerate(self.jobs) if job is None]

    @property
    def is_idle(self) -> bool:
        return all(job is None for job in self.jobs)

    @property
    def positions(self) -> torch.Tensor:
        """Positions [B] of the newest tokens in their texts."""
        return (self.prompts + self.counts - 1).clamp(min=0)

    def place(self, rows: Sequence[int], jobs: Sequence[Job], logits: torch.Tensor) -> None:
        """Begins an answer in each of these rows, from logits [n, V] at the prompts' ends."""
        for row, job in zip(rows, jobs, strict=True):
            self.jobs[row] = job
        into = torch.tensor(rows, device=self.device)
        self.prompts[into] = torch.tensor([len(job.ids) for job in jobs], device=self.device)
        self.limits[into] = torch.tensor([job.most for job in jobs], device=self.device)
        if self.temperature:
            chances = np.zeros((len(jobs), self.most))
            for chance, job in zip(chances, jobs, strict=True):
                chance[: job.most] = np.random.default_rng(job.seed).random(job.most)
            self.chances[into] = torch.from_numpy(chances).to(self.device)
        first = self._chosen(logits, self.chances[into, :1])
        self.tokens[into] = self.written[into, 0] = first
        self.counts[into] = 1
        self.has_ended[into] = torch.isin(first, self.eos) | (self.limits[into] <= 1)

    def take(self, logits: torch.Tensor) -> None:
        """One more token in every row that has not ended, from logits [B, V]."""
        column = self.counts.where(~self.has_ended, self.most)[:, None]
        chances = self.chances.gather(1, column.clamp(max=self.most - 1)) if self.temperature else self.chances
        self.tokens = self._chosen(logits, chances)
        self.written.scatter_(1, column, self.tokens[:, None])
        self.counts += ~self.has_ended
        self.has_ended |= torch.isin(self.tokens, self.eos) | (self.counts >= self.limits)

    def finished(self) -> list[tuple[Job, list[int]]]:
        """Answers that have ended, with the token that ended them; their rows are free from then on."""
        ended = [row for row, has_ended in enumerate(self.has_ended.tolist()) if has_ended and self.jobs[row]]
        if not ended:
            return []
        rows = torch.tensor(ended, device=self.device)
        found = torch.cat([self.counts[rows, None], self.written[rows]], dim=1).tolist()
        answers = []
        for row, (count, *tokens) in zip(ended, found, strict=True):
            job, self.jobs[row] = self.jobs[row], None
            assert job is not None
            answers.append((job, tokens[:count]))
        return answers

    def keep(self, rows: Sequence[int]) -> None:
        """Leaves only these rows, in this order."""
        kept = torch.tensor(rows, device=self.device)
        self.jobs = [self.jobs[row] for row in rows]
        for name in ("tokens", "counts", "limits", "prompts", "has_ended", "written", "chances"):
            setattr(self, name, getattr(self, name)[kept])

    def _chosen(self, logits: torch.Tensor, chances: torch.Tensor) -> torch.Tensor:
        if not self.temperature:
            return logits.argmax(-1)
        # fp64, as sums over many tokens should not lose the unlikely ones; torch.multinomial would wait, to check
        reached = (logits.float() / self.temperature).softmax(-1, dtype=torch.float64).cumsum(-1)
        drawn = torch.searchsorted(reached, chances * reached[:, -1:], right=True)[:, 0]
        return drawn.clamp(max=logits.shape[-1] - 1)
