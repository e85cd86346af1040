"""From records of rows to means, standard errors and paired comparisons."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean, stdev
from typing import Any

from retention_gates.trainers.evaluation import FULL_CACHE

LOWER_IS_BETTER = {
    "kl": True,
    "nll": True,
    "agreement": False,
    "token_accuracy": False,
    "exact": False,
    "score": False,
}


@dataclass(frozen=True)
class Pairing:
    """How often a contender was better than the reference on the very same row; ties count for neither."""

    wins: int
    losses: int
    ties: int
    p_value: float  # of an exact two-sided sign test


@dataclass(frozen=True)
class Score:
    """The mean of one metric over rows."""

    mean: float
    standard_error: float | None  # None for a single row
    pairing: Pairing | None  # None for the full cache, the reference itself, or if there is no reference


@dataclass(frozen=True)
class Summary:
    """All metrics of one contender on one task."""

    task: str
    policy: str
    memory_size: int | None
    budgets: str | None
    rows: int
    scores: dict[str, Score]


def aggregate(records: Sequence[dict[str, Any]], *, reference: str | None = None) -> list[Summary]:
    """Summaries of all contenders, in the order they first appear; `perplexity_ratio` comes with `nll` and `full_nll`.

    Args:
        records: as `compare_rows` and `compare_answers` give them.
        reference: the policy whose uniform budgets of the same memory size each contender is compared with, by row.
    """
    groups: dict[tuple, dict[int, dict[str, Any]]] = {}
    for record in records:
        key = (record["task"], record["policy"], record["memory_size"], record["budgets"])
        rows = groups.setdefault(key, {})
        if record["row"] in rows:
            raise ValueError(f"Two records of {key} are of row {record['row']}: aggregate one run at a time.")
        rows[record["row"]] = record
    summaries = []
    for (task, policy, memory_size, budgets), rows in groups.items():
        rival_key = (task, reference, memory_size, "uniform")
        rivals = {} if policy in (FULL_CACHE, reference) else groups.get(rival_key, {})
        first = next(iter(rows.values()))
        scores = {}
        for metric in (m for m in LOWER_IS_BETTER if m in first):
            values = {row: record[metric] for row, record in rows.items()}
            rival_values = {row: record[metric] for row, record in rivals.items()}
            pairing = pair(values, rival_values, lower_is_better=LOWER_IS_BETTER[metric]) if rivals else None
            scores[metric] = Score(fmean(values.values()), standard_error(list(values.values())), pairing)
        if "nll" in first and "full_nll" in first:
            scores["perplexity_ratio"] = _perplexity_ratio(list(rows.values()), scores["nll"].pairing)
        summaries.append(Summary(task, policy, memory_size, budgets, len(rows), scores))
    return summaries


def standard_error(values: Sequence[float]) -> float | None:
    """Of the mean, from the sample's standard deviation; None for a single value."""
    return stdev(values) / math.sqrt(len(values)) if len(values) > 1 else None


def pair(values: dict[int, float], rivals: dict[int, float], *, lower_is_better: bool) -> Pairing:
    """Compares values with a rival's of the same rows."""
    if values.keys() != rivals.keys():
        raise ValueError("A contender and its reference were scored on different rows: score both on the same ones.")
    lower = sum(values[row] < rivals[row] for row in values)
    higher = sum(values[row] > rivals[row] for row in values)
    wins, losses = (lower, higher) if lower_is_better else (higher, lower)
    return Pairing(wins, losses, len(values) - wins - losses, sign_test(wins, losses))


def sign_test(wins: int, losses: int) -> float:
    """Two-sided p-value that wins and losses are equally likely: a fair coin is this uneven, or more."""
    throws = wins + losses
    tail = sum(math.comb(throws, k) for k in range(min(wins, losses) + 1))
    return min(1.0, 2 * tail / 2**throws)


def _perplexity_ratio(rows: Sequence[dict[str, Any]], pairing: Pairing | None) -> Score:
    """Perplexity over the full cache's, both over all rows; the standard error is that of the log, to first order."""
    increases = [row["nll"] - row["full_nll"] for row in rows]
    ratio = math.exp(fmean(increases))
    error = standard_error(increases)
    return Score(ratio, None if error is None else ratio * error, pairing)
