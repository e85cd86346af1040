"""Training rows: packed text, with a share of recall tasks mixed in."""

from bisect import bisect_right
from collections.abc import Sequence
from typing import Any

import numpy as np
from torch.utils.data import Dataset
from transformers import PreTrainedTokenizerBase

from retention_gates.data.document_facts import document_facts
from retention_gates.data.packing import PackedRows, Row, check_row_length, check_targets
from retention_gates.data.tasks import Filler, build_tasks
from retention_gates.data.tokens import TokenDocument, document_prefix

ATTEMPTS = 64


class TrainingRows(Dataset[Row]):
    """Rows for training; row i depends on the seed and i alone, so a run can stop at any row and go on.

    Text: in every epoch the documents come in another order, the first is cut at another place, and the full rows in
    another order; each is used once. So few tokens still give new rows. Recall tasks: spread evenly over the rows,
    the tasks taking turns. The number of rows that an epoch gives can differ by a few.

    Args:
        row_length: tokens of a row.
        task_share: share of the rows that are recall tasks, 0 to 1.
        tasks: names of the tasks, see `retention_gates.data.tasks.TASKS`; their filler is the texts among `documents`.
        length: number of rows, of any size; one epoch of the text if None.

    Raises:
        ValueError: what `PackedRows` and the tasks refuse; a share outside 0 to 1, or above 0 without tasks.
    """

    def __init__(
        self,
        documents: Sequence[TokenDocument],
        row_length: int,
        seed: int,
        task_share: float,
        tasks: Sequence[str],
        tokenizer: PreTrainedTokenizerBase,
        *,
        length: int | None = None,
    ) -> None:
        if not 0 <= task_share <= 1:
            raise ValueError(f"task_share={task_share} must lie between 0 (text only) and 1 (tasks only)")
        if seed < 0:
            raise ValueError(f"seed={seed}; give 0 or more")
        if length is not None and length < 1:
            raise ValueError(f"length={length} rows; give 1 or more, or None for one epoch")
        self.prefix = document_prefix(tokenizer)
        check_row_length(row_length, self.prefix)
        self.documents = [document for document in documents if len(document.ids)]
        self.row_length, self.seed, self.task_share = row_length, seed, task_share
        self.tasks = build_tasks(tasks)
        if task_share and not self.tasks:
            raise ValueError(f"task_share={task_share} but tasks is empty; name a task or set task_share to 0")
        self._epochs: list[tuple[PackedRows, np.ndarray]] = []  # the rows of each epoch and their order
        self._epoch_starts = [0]  # text rows before each epoch
        self._plan_epoch()
        if task_share:
            texts = [document for document in self.documents if document.targets is None]
            self._filler = Filler(tokenizer, texts or self.documents)
            for task in self.tasks:
                task.training_row(self._filler, row_length, seed, 0)  # a row too short for a task shows now, not later
        text_rows = self._epoch_starts[1]
        self._length = length or (round(text_rows / (1 - task_share)) if task_share < 1 else text_rows)

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int) -> Row:
        if not 0 <= index < self._length:
            raise IndexError(f"row {index} of {self._length}")
        tasks_before = int(index * self.task_share)
        if self._is_task(index):
            task = self.tasks[tasks_before % len(self.tasks)]
            return task.training_row(self._filler, self.row_length, self.seed, tasks_before)
        rows, row = self._text_row(index - tasks_before)
        return rows[row]

    def document_facts(self) -> dict[str, Any]:
        return document_facts(self.documents)

    def cost(self, index: int) -> float:
        """Sum of the squares of the lengths of a row's documents, which attention's time goes with."""
        if self._is_task(index):
            return float(self.row_length) ** 2
        rows, row = self._text_row(index - int(index * self.task_share))
        return float(sum((piece.stop - piece.start) ** 2 for piece in rows.pieces(row)))

    def _is_task(self, index: int) -> bool:
        return int((index + 1) * self.task_share) > int(index * self.task_share)

    def _text_row(self, index: int) -> tuple[PackedRows, int]:
        """The rows of an epoch, and which of them it is."""
        while index >= self._epoch_starts[-1]:
            self._plan_epoch()
        epoch = bisect_right(self._epoch_starts, index) - 1
        rows, order = self._epochs[epoch]
        return rows, int(order[index - self._epoch_starts[epoch]])

    def _plan_epoch(self) -> None:
        # In a few chats, an unlucky order can leave every target in the remainder. A run must not end on that.
        for attempt in range(ATTEMPTS):
            rng = np.random.default_rng([self.seed, len(self._epochs), attempt])
            order = rng.permutation(len(self.documents)).tolist()
            cut = int(rng.integers(len(self.documents[order[0]].ids))) if order else 0
            rows = PackedRows(self.documents, self.row_length, prefix_ids=self.prefix, order=order, first_cut=cut)
            if len(rows):
                break
        check_targets(rows)
        self._epochs.append((rows, rng.permutation(len(rows))))
        self._epoch_starts.append(self._epoch_starts[-1] + len(rows))
