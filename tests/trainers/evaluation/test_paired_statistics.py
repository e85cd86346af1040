"""Means, errors and paired comparisons of numbers made by hand."""

import math

import pytest

from retention_gates.trainers.evaluation.paired_statistics import (
    EXACT_ROWS,
    aggregate,
    holm,
    pair,
    sign_flip_test,
    sign_test,
    standard_error,
)


def record(policy, row, kl, nll, memory_size=64, budgets="uniform", task="text", full_nll=2.0):
    name = {"task": task, "row": row, "policy": policy, "memory_size": memory_size, "budgets": budgets}
    return name | {"kl": kl, "nll": nll, "full_nll": full_nll, "agreement": 1 - kl}


RECORDS = [
    *(record("full", row, 0.0, 2.0, None, None) for row in range(3)),
    *(record("streaming_llm", row, kl, 2.0 + kl) for row, kl in enumerate([0.5, 0.7, 0.3])),
    *(record("retention", row, kl, 2.0 + kl) for row, kl in enumerate([0.1, 0.7, 0.4])),
    *(record("retention", row, kl, 2.0 + kl, budgets="calibrated") for row, kl in enumerate([0.1, 0.2, 0.15])),
    *(record("retention", row, kl, 2.0 + kl, memory_size=128) for row, kl in enumerate([0.1, 0.2, 0.15])),
]


def test_means_and_standard_errors():
    summaries = aggregate(RECORDS, reference="streaming_llm")
    named = {(s.policy, s.memory_size, s.budgets): s for s in summaries}
    assert list(named) == [
        ("full", None, None),
        ("streaming_llm", 64, "uniform"),
        ("retention", 64, "uniform"),
        ("retention", 64, "calibrated"),
        ("retention", 128, "uniform"),
    ]
    kl = named["streaming_llm", 64, "uniform"].scores["kl"]
    assert kl.mean == pytest.approx(0.5)
    assert kl.standard_error == pytest.approx(0.2 / math.sqrt(3))  # deviations 0, 0.2, -0.2 over n - 1 = 2
    ratio = named["streaming_llm", 64, "uniform"].scores["perplexity_ratio"]
    assert ratio.mean == pytest.approx(math.exp(0.5))
    assert ratio.standard_error == pytest.approx(math.exp(0.5) * 0.2 / math.sqrt(3))
    full = named["full", None, None].scores
    assert full["perplexity_ratio"].mean == 1 and full["kl"].mean == 0 and full["nll"].mean == 2
    assert all(summary.rows == 3 for summary in summaries)


def test_pairs_by_row_and_memory_size():
    named = {(s.policy, s.memory_size, s.budgets): s for s in aggregate(RECORDS, reference="streaming_llm")}
    uniform = named["retention", 64, "uniform"].scores
    for metric, difference in (("kl", -0.1), ("agreement", 0.1)):  # higher is better in the latter
        pairing = uniform[metric].pairing
        assert (pairing.wins, pairing.losses, pairing.ties, pairing.p_value) == (1, 1, 1, 1)
        assert pairing.difference == pytest.approx(difference)
        assert pairing.p_mean == 1, "0.4 and 0.1 are as far apart as -0.3 with any signs"
    calibrated = named["retention", 64, "calibrated"].scores["kl"].pairing
    assert (calibrated.wins, calibrated.losses, calibrated.ties) == (3, 0, 0)
    assert calibrated.p_value == calibrated.p_mean == 0.25
    assert named["retention", 128, "uniform"].scores["kl"].pairing is None, "there is no rival of this size"
    assert named["streaming_llm", 64, "uniform"].scores["kl"].pairing is None
    assert named["full", None, None].scores["kl"].pairing is None
    assert all(s.scores["kl"].pairing is None for s in aggregate(RECORDS))


def test_tasks_are_apart_and_metrics_their_own():
    answers = [
        {"task": task, "row": 0, "policy": "random", "memory_size": 8, "budgets": "uniform"}
        | {"token_accuracy": accuracy, "exact": 0.0}
        for task, accuracy in (("passkey", 0.5), ("code_lookup", 0.25))
    ]
    first, second = aggregate(answers)
    assert (first.task, second.task) == ("passkey", "code_lookup")
    assert set(first.scores) == {"token_accuracy", "exact"}
    assert first.scores["token_accuracy"].mean == 0.5 and first.scores["token_accuracy"].standard_error is None


@pytest.mark.parametrize(
    ("wins", "losses", "p_value"),
    [(0, 0, 1), (1, 0, 1), (3, 3, 1), (8, 0, 2 / 256), (0, 8, 2 / 256), (7, 1, 18 / 256), (1, 9, 22 / 1024)],
)
def test_sign_test(wins, losses, p_value):
    assert sign_test(wins, losses) == pytest.approx(p_value)


def test_what_cannot_be_compared():
    with pytest.raises(ValueError, match="different rows"):
        pair({0: 1.0, 1: 2.0}, {0: 1.0}, lower_is_better=True)
    with pytest.raises(ValueError, match="Two records .* row 1"):
        aggregate([*RECORDS, RECORDS[1]])
    assert standard_error([1.0]) is None


def test_seeds_are_rows_of_their_own_and_lengths_tasks_of_their_own():
    kl = {(1, 512): 0.1, (2, 512): 0.3, (1, 1024): 0.7}
    records = [
        record("random", 0, value, 2 + value) | {"seed": seed, "length": length}
        for (seed, length), value in kl.items()
    ]
    short, long = aggregate(records)
    assert (short.length, short.rows, long.length, long.rows) == (512, 2, 1024, 1)
    assert short.scores["kl"].mean == pytest.approx(0.2)
    assert short.scores["kl"].values == {(1, 0): 0.1, (2, 0): 0.3}


@pytest.mark.parametrize(
    ("differences", "p_value"),
    [([1.0], 1), ([1.0, 2.0], 0.5), ([-1.0, 2.0], 1), ([0.1] * 3 + [0.2], 2 / 16), ([3.0, 1.0, -1.0, 0.0], 0.75)],
)
def test_sign_flip_test_by_hand(differences, p_value):
    assert sign_flip_test(differences) == pytest.approx(p_value)
    assert sign_flip_test([-d for d in differences]) == pytest.approx(p_value)


def test_a_sample_of_sign_patterns_is_close_to_all_of_them():
    few = [0.3, -0.1, 0.4, 0.2, -0.25, 0.15, 0.05, 0.3, -0.2, 0.1, 0.12, -0.02, 0.08]
    assert len(few) == EXACT_ROWS
    # a difference of 0 changes neither the sums nor, therefore, the share of patterns
    assert sign_flip_test([*few, 0.0]) == pytest.approx(sign_flip_test(few), abs=0.01)
    assert 0 < sign_flip_test([1.0] * 40) < 1e-4, "what was seen counts as one of the patterns"


def test_holm():
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])  # worked by hand
    assert holm([0.5, 0.9]) == [1.0, 1.0] and holm([]) == []
