"""From records of rows to means, standard errors and paired comparisons."""

import math
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from statistics import fmean, stdev
from typing import Any

import numpy as np

from retention_gates.trainers.evaluation.contenders import FULL_CACHE

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
    """The comparison of a contender with a rival on the very same rows; ties count for neither."""

    wins: int
    losses: int
    ties: int
    difference: float  # mean of contender - rival, in the metric's unit
    p_value: float  # of an exact two-sided sign test
    p_mean: float  # two-sided: the mean difference is 0, by flipping signs


@dataclass(frozen=True)
class Score:
    """The mean of one metric over rows."""

    mean: float
    standard_error: float | None  # None for a single row
    pairing: Pairing | None  # None for the full cache, the reference itself, or if there is no reference
    values: dict[Hashable, float] = field(default_factory=dict, repr=False, compare=False)  # of each row


@dataclass(frozen=True)
class Summary:
    """All metrics of one contender on one task; `length` in tokens, None where records don't say."""

    task: str
    length: int | None
    policy: str
    memory_size: int | None
    budgets: str | None
    rows: int
    scores: dict[str, Score]


def aggregate(records: Sequence[dict[str, Any]], *, reference: str | None = None) -> list[Summary]:
    """Summaries of all contenders, in the order they first appear; `perplexity_ratio` comes with `nll` and `full_nll`.

    Args:
        records: as `compare_rows` and `compare_answers` give them; each `seed`, if they have one, is of other rows,
            and each `length` another task.
        reference: the policy whose uniform budgets of the same memory size each contender is compared with, by row.
    """
    groups: dict[tuple, dict[Hashable, dict[str, Any]]] = {}
    for record in records:
        key = (record["task"], record.get("length"), record["policy"], record["memory_size"], record["budgets"])
        rows = groups.setdefault(key, {})
        row = (record.get("seed"), record["row"])
        if row in rows:
            raise ValueError(f"Two records of {key} are of row {record['row']}: aggregate one run at a time.")
        rows[row] = record
    summaries = []
    for (task, length, policy, memory_size, budgets), rows in groups.items():
        rival_key = (task, length, reference, memory_size, "uniform")
        rivals = {} if policy in (FULL_CACHE, reference) else groups.get(rival_key, {})
        first = next(iter(rows.values()))
        scores = {}
        for metric in (m for m in LOWER_IS_BETTER if m in first):
            values = {row: record[metric] for row, record in rows.items()}
            rival_values = {row: record[metric] for row, record in rivals.items()}
            pairing = pair(values, rival_values, lower_is_better=LOWER_IS_BETTER[metric]) if rivals else None
            scores[metric] = Score(fmean(values.values()), standard_error(list(values.values())), pairing, values)
        if "nll" in first and "full_nll" in first:
            scores["perplexity_ratio"] = _perplexity_ratio(list(rows.values()), scores["nll"].pairing)
        summaries.append(Summary(task, length, policy, memory_size, budgets, len(rows), scores))
    return summaries


def mean_over_samples(records: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """One record for each question and contender, whose score is the mean over the question's samples.

    Its standard error is then one over questions, since the answers to one question depend on each other.
    """
    groups: dict[tuple, list[dict[str, Any]]] = {}
    for record in records:
        names = ("task", "length", "seed", "row", "policy", "memory_size", "budgets")
        groups.setdefault(tuple(record.get(name) for name in names), []).append(record)
    return [group[0] | {"score": fmean(record["score"] for record in group)} for group in groups.values()]


def standard_error(values: Sequence[float]) -> float | None:
    """Of the mean, from the sample's standard deviation; None for a single value."""
    return stdev(values) / math.sqrt(len(values)) if len(values) > 1 else None


def pair(values: Mapping[Hashable, float], rivals: Mapping[Hashable, float], *, lower_is_better: bool) -> Pairing:
    """Compares values with a rival's of the same rows."""
    if values.keys() != rivals.keys():
        raise ValueError("A contender and its reference were scored on different rows: score both on the same ones.")
    differences = [values[row] - rivals[row] for row in values]
    lower, higher = sum(d < 0 for d in differences), sum(d > 0 for d in differences)
    wins, losses = (lower, higher) if lower_is_better else (higher, lower)
    ties = len(differences) - wins - losses
    return Pairing(wins, losses, ties, fmean(differences), sign_test(wins, losses), sign_flip_test(differences))


def sign_test(wins: int, losses: int) -> float:
    """Two-sided p-value that wins and losses are equally likely: a fair coin is this uneven, or more."""
    throws = wins + losses
    tail = sum(math.comb(throws, k) for k in range(min(wins, losses) + 1))
    return min(1.0, 2 * tail / 2**throws)


EXACT_ROWS, DRAWS = 13, 20_000  # up to 2^13 sign patterns are all tried; of more so many are drawn


def sign_flip_test(differences: Sequence[float]) -> float:
    """Two-sided p-value that paired differences are as likely positive as negative, whatever their sizes.

    Each difference keeps its size and gets either sign; p is the share of patterns whose mean is as far from 0 as the
    one seen, or further. All patterns for few rows; of many a fixed sample, in which the one seen counts as well.
    """
    signs = _sign_patterns(len(differences))
    seen = np.array(differences)
    # a hair's breadth, since equal sums in another order differ by rounding
    as_far = int((np.abs(signs @ seen) >= abs(seen.sum()) - 1e-9 * np.abs(seen).sum()).sum())
    return as_far / len(signs) if len(differences) <= EXACT_ROWS else (as_far + 1) / (len(signs) + 1)


@lru_cache(maxsize=8)
def _sign_patterns(rows: int) -> np.ndarray:  # [patterns, rows] of +-1
    if rows <= EXACT_ROWS:
        return 1.0 - 2.0 * (np.arange(2**rows)[:, None] >> np.arange(rows) & 1)
    return 1.0 - 2.0 * np.random.default_rng(0).integers(2, size=(DRAWS, rows))


def holm(p_values: Sequence[float]) -> list[float]:
    """p-values corrected for being many (Holm 1979): under a threshold with that chance of any error at all."""
    corrected = [0.0] * len(p_values)
    reached = 0.0
    for rank, index in enumerate(sorted(range(len(p_values)), key=p_values.__getitem__)):
        reached = max(reached, min(1.0, (len(p_values) - rank) * p_values[index]))
        corrected[index] = reached
    return corrected


def _perplexity_ratio(rows: Sequence[dict[str, Any]], pairing: Pairing | None) -> Score:
    """Perplexity over the full cache's, both over all rows; the standard error is that of the log, to first order."""
    increases = [row["nll"] - row["full_nll"] for row in rows]
    ratio = math.exp(fmean(increases))
    error = standard_error(increases)
    return Score(ratio, None if error is None else ratio * error, pairing)
