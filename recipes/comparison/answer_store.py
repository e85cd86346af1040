"""Written answers that are kept as they come."""

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import nn

from retention_gates.data.suites import EncodedQuestion
from retention_gates.recipes.comparison.fingerprints import of_value
from retention_gates.recipes.comparison.result_store import ANSWERS, Records, ResultStore, Unit
from retention_gates.recipes.comparison.units import Units
from retention_gates.trainers.evaluation.answer_batches import ending_tokens
from retention_gates.trainers.evaluation.written import Ask

SECONDS = 1.0  # between two writes: each waits for the disk


class AnswerStore:
    """Answers of earlier runs in the same folder, and a place for new ones.

    An answer is taken if nothing has changed that it depends on. How many are written at a time changes no more than
    rounding. Scores are not stored but computed from the answers.

    Args:
        facts: what all answers of this run depend on, beside model, question and contender.
    """

    def __init__(self, folder: Path, model: nn.Module, questions: Sequence[EncodedQuestion], **facts: Any):
        self.store = ResultStore(folder, ANSWERS)
        self.units, self.facts = Units(model), facts
        endings = ending_tokens(model)
        longest = facts.get("max_new_tokens")
        self.digests = [
            of_value([question.prompt_ids, longest or question.max_new_tokens, endings]) for question in questions
        ]
        self.tasks = [question.task for question in questions]
        self.pending: list[tuple[Unit, Records]] = []
        self.written = time.monotonic()

    def known(self, ask: Ask) -> dict[str, Any] | None:
        """The record of an answer that is there already, as it was stored."""
        found = self.store.get(self._unit(ask))
        return None if found is None else found[0] | {"row": ask.row}

    def add(self, ask: Ask, record: dict[str, Any]) -> None:
        """Takes a record, which is on the disk a second later."""
        self.pending.append((self._unit(ask), [record]))
        if time.monotonic() - self.written >= SECONDS:
            self.flush()

    def flush(self) -> None:
        """Writes what was taken."""
        if self.pending:
            self.store.add(self.pending)
            self.pending = []
        self.written = time.monotonic()

    def _unit(self, ask: Ask) -> Unit:
        # the random numbers of a drawn answer follow from these
        drawn = {"row": ask.row, "sample": ask.sample} if self.facts["temperature"] else {}
        return self.units.of(ask.contender, task=self.tasks[ask.index], question=self.digests[ask.index], **drawn) | (
            self.facts
        )
