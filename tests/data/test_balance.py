"""Rows of a step are dealt out so that ranks finish together, and stay in their step."""

import random
from collections import Counter

import pytest

from retention_gates.data.balance import BalancedRows, balanced_order
from retention_gates.data.mixture import TrainingRows
from retention_gates.data.tokens import TokenDocument


class Costed:
    def __init__(self, costs):
        self.costs = costs

    def __len__(self):
        return len(self.costs)

    def __getitem__(self, index):
        return index

    def cost(self, index):
        return self.costs[index]


def waiting(costs: list[float], order: list[int], rows_per_pass: int, ranks: int, *, each_pass: bool) -> float:
    """Share of the ranks' time that is spent waiting for the slowest, in each pass or at the end of the step."""
    hands = [order[i : i + rows_per_pass] for i in range(0, len(order), rows_per_pass)]  # to the ranks in turn
    sums = [sum(costs[row] for row in hand) for hand in hands]
    if each_pass:
        longest = sum(max(sums[i : i + ranks]) for i in range(0, len(sums), ranks))
    else:
        longest = max(sum(sums[rank::ranks]) for rank in range(ranks))
    return 1 - sum(sums) / (ranks * longest)


@pytest.mark.parametrize("rows_per_pass, ranks, passes", [(1, 2, 4), (2, 4, 2), (1, 8, 8), (4, 2, 3)])
def test_ranks_wait_less(rows_per_pass: int, ranks: int, passes: int):
    waits: dict[tuple[bool, str], float] = Counter()
    for seed in range(20):
        rng = random.Random(seed)
        costs = [rng.uniform(0.02, 1) ** 2 for _ in range(rows_per_pass * ranks * passes)]
        order = balanced_order(costs, rows_per_pass, ranks)
        assert sorted(order) == list(range(len(costs)))
        for each_pass in (True, False):
            for name, taken in (("as they come", list(range(len(costs)))), ("balanced", order)):
                waits[each_pass, name] += waiting(costs, taken, rows_per_pass, ranks, each_pass=each_pass) / 20
    for each_pass in (True, False):
        assert waits[each_pass, "as they come"] > 0.1
        assert waits[each_pass, "balanced"] < 0.6 * waits[each_pass, "as they come"]


def test_every_step_keeps_its_rows_whatever_the_ranks():
    costs = [random.Random(i).random() for i in range(26)]  # three steps of eight, and two rows
    for ranks, rows_per_pass in ((1, 8), (2, 2), (4, 1)):
        rows = BalancedRows(Costed(costs), rows_per_step=8, rows_per_pass=rows_per_pass, ranks=ranks)
        seen = [rows[i] for i in range(len(rows))]
        for first in (0, 8, 16):
            assert sorted(seen[first : first + 8]) == list(range(first, first + 8))
        assert seen[24:] == [24, 25] and [rows[i] for i in (17, 3)] == [seen[17], seen[3]]


def test_a_row_costs_the_squares_of_its_documents(tokenizer, token_documents):
    short = [TokenDocument(str(i), document.ids[:20]) for i, document in enumerate(token_documents * 20)]
    rows = TrainingRows([*token_documents, *short], 64, 0, 0.0, [], tokenizer)
    costs = [rows.cost(i) for i in range(len(rows))]
    assert max(costs) > 60**2 and min(costs) < 64**2 / 2
    for index in (costs.index(max(costs)), costs.index(min(costs))):
        starts = (rows[index]["position_ids"] == 0).nonzero().flatten().tolist()
        lengths = [stop - start for start, stop in zip(starts, [*starts[1:], 64], strict=True)]
        # a piece from inside a document has its opening tokens beside it
        assert costs[index] == pytest.approx(sum(n * n for n in lengths), rel=0.1)
