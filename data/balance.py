"""Assigns the rows of a step to ranks, so that no rank waits long for another."""

from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
from torch.utils.data import Dataset

from retention_gates.data.packing import Row


class CostedRows(Protocol):
    """Rows that know what their attention costs without being made."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Row: ...

    def cost(self, index: int) -> float: ...

    def document_facts(self) -> dict[str, Any]: ...


class BalancedRows(Dataset[Row]):
    """The same rows in each optimiser step, in an order that gives ranks rows of like cost at the same time.

    All rows have the same number of tokens, but attention costs the sum of the squares of a row's document lengths:
    one book costs many times what a hundred chats do. A loader hands batches of `rows_per_pass` rows to the ranks in
    turn; within a step it does not matter to the loss who computes what. Rows after the last full step stay as they
    are.
    """

    def __init__(self, rows: CostedRows, *, rows_per_step: int, rows_per_pass: int, ranks: int):
        assert rows_per_step % (rows_per_pass * ranks) == 0
        self.rows, self.rows_per_step = rows, rows_per_step
        self.rows_per_pass, self.ranks = rows_per_pass, ranks
        self._step = -1
        self._order: Sequence[int] = ()

    def __len__(self) -> int:
        return len(self.rows)

    def document_facts(self) -> dict[str, Any]:
        return self.rows.document_facts()

    def __getitem__(self, index: int) -> Row:
        step, place = divmod(index, self.rows_per_step)
        first = step * self.rows_per_step
        if not 0 <= index < len(self.rows) or first + self.rows_per_step > len(self.rows):
            return self.rows[index]
        if step != self._step:
            costs = [self.rows.cost(first + i) for i in range(self.rows_per_step)]
            self._order, self._step = balanced_order(costs, self.rows_per_pass, self.ranks), step
        return self.rows[first + self._order[place]]


def balanced_order(costs: Sequence[float], rows_per_pass: int, ranks: int) -> list[int]:
    """Order of the rows of one step: those of like cost are computed at the same time, dealt out to make sums alike.

    Ranks wait for each other in every pass if the model is sharded, else at the end of the step.
    """
    by_cost = np.argsort(-np.asarray(costs), kind="stable")
    order: list[int] = []
    sums = [0.0] * ranks
    for first in range(0, len(costs), rows_per_pass * ranks):
        hands: list[list[int]] = [[] for _ in range(ranks)]
        for row in by_cost[first : first + rows_per_pass * ranks].tolist():
            rank = min((r for r in range(ranks) if len(hands[r]) < rows_per_pass), key=sums.__getitem__)
            hands[rank].append(row)
            sums[rank] += costs[row]
        order += [row for hand in hands for row in hand]
    return order
