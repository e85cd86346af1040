"""Budgets add up, respect their floor and follow the shares; shares are the mean retained mass."""

import itertools
import math

import pytest
import torch
from gated_models import gated_model, token_ids
from hypothesis import given
from hypothesis import strategies as st

from retention_gates import record
from retention_gates.gates.cache.budgets import RetainedMass, calibrated_budgets, pyramid_budgets, uniform_budgets

# 0 and anything from tiny to huge, some of them equal
share = st.one_of(st.just(0.0), st.floats(1e-6, 1e6), st.integers(0, 5).map(float))


@given(st.lists(st.lists(share, min_size=2, max_size=2), min_size=1, max_size=8), st.integers(1, 300), st.data())
def test_calibrated_budgets_add_up_and_follow_the_shares(shares, memory_size, data):
    floor = data.draw(st.integers(1, memory_size))
    budgets = calibrated_budgets(shares, memory_size, floor)
    assert [len(row) for row in budgets] == [2] * len(shares)
    entries = [entry for row in budgets for entry in row]
    wanted = [value for row in shares for value in row]
    assert sum(entries) == memory_size * len(entries)
    assert min(entries) >= floor
    ranked = sorted(zip(wanted, entries, strict=True))
    for (less, few), (more, many) in itertools.pairwise(ranked):
        assert few <= many + (1 if less == more else 0)
    # those above the floor share in proportion, up to rounding
    above = [(value, entry) for value, entry in zip(wanted, entries, strict=True) if entry > floor + 1]
    mass = sum(value for value, _ in above)
    for value, entry in above:
        if mass > 0:
            exact = sum(entry for _, entry in above) * value / mass
            assert abs(entry - exact) <= 1 + len(entries) * value / mass


def test_calibrated_budgets_by_hand():
    assert calibrated_budgets([[1.0, 3.0], [4.0, 8.0]], 16, 1) == [[4, 12], [16, 32]]
    # floor 8: the first gets 8, the others 56 in proportion 3:4:8
    assert calibrated_budgets([[1.0, 3.0], [4.0, 8.0]], 16, 8) == [[8, 11], [15, 30]]
    assert calibrated_budgets([[0.0, 0.0]], 5, 2) == [[5, 5]]
    assert calibrated_budgets([[7.0, 1.0]], 5, 5) == [[5, 5]]
    # 10 / 3 each: the first gets what is left over
    assert calibrated_budgets([[1.0, 1.0, 1.0], [1.0, 0.0, 0.0]], 3, 1) == [[4, 4, 4], [4, 1, 1]]


def test_uniform_budgets():
    assert uniform_budgets(2, 3, 7) == [[7, 7, 7], [7, 7, 7]]


@pytest.mark.parametrize("shares", [[[1.0, math.nan]], [[1.0, -1.0]], [[1.0, math.inf]], []])
def test_shares_must_be_finite_and_not_negative(shares):
    with pytest.raises(ValueError, match="calibrate again"):
        calibrated_budgets(shares, 8, 1)


def test_floor_above_memory_size():
    with pytest.raises(ValueError, match="memory_size=8 is below the 9"):
        calibrated_budgets([[1.0, 1.0]], 8, 9)


def brute_mass(log_beta, first_step, documents):
    """Mean of S_t over the steps that are at least first_step into their document."""
    batch, heads, tokens = log_beta.shape
    total, steps = torch.zeros(heads, dtype=torch.float64), 0
    for row in range(batch):
        for t in range(tokens):
            own = [i for i in range(t + 1) if documents[row][i] == documents[row][t] >= 0]
            if len(own) > first_step:
                steps += 1
                for i in own:
                    total += torch.exp((t - i) * log_beta[row, :, i].double())
    return total / steps


def test_shares_are_the_mean_retained_mass():
    torch.manual_seed(0)
    log_beta = [-torch.rand(2, 3, 20), -torch.rand(2, 3, 20) / 10]
    documents = torch.tensor([[0] * 20, [-1] * 3 + [0] * 4 + [1] * 13])
    mass = RetainedMass(first_step=5)
    mass.add([layer[:1] for layer in log_beta], documents[:1])
    mass.add([layer[1:] for layer in log_beta], documents[1:])
    for shares, layer in zip(mass.shares(), log_beta, strict=True):
        torch.testing.assert_close(torch.tensor(shares).double(), brute_mass(layer, 5, documents.tolist()))
    whole = RetainedMass(first_step=5)
    whole.add([layer[:1] for layer in log_beta])
    expected = brute_mass(log_beta[0][:1], 5, [[0] * 20])
    torch.testing.assert_close(torch.tensor(whole.shares()[0]).double(), expected)


def test_shares_of_a_model():
    model = gated_model()
    mass = RetainedMass(first_step=10)
    with torch.no_grad(), record(model) as recording:
        model(input_ids=token_ids(2, 30), use_cache=False)
    mass.add(recording.log_beta, recording.document_ids)
    shares = torch.tensor(mass.shares())
    assert shares.shape == (4, 2)
    assert (shares >= 3).all() and (shares <= 30).all()  # two protected tokens and the newest; no more than have been


def test_too_short_documents():
    mass = RetainedMass(first_step=20)
    mass.add([-torch.rand(1, 1, 20)])
    with pytest.raises(ValueError, match="more than 20 tokens"):
        mass.shares()


def test_pyramid_budgets_fall_evenly():
    # 20 entries in the mean: the last layer gets 1, the first 39
    assert pyramid_budgets(3, 2, 20, floor=1) == [[39, 39], [20, 20], [1, 1]]
    assert pyramid_budgets(1, 2, 20, floor=3) == [[20, 20]]
    budgets = pyramid_budgets(30, 3, 64, floor=5)
    assert sum(map(sum, budgets)) == 30 * 3 * 64 and all(len(set(row)) == 1 for row in budgets)
    per_layer = [row[0] for row in budgets]
    assert per_layer == sorted(per_layer, reverse=True) and per_layer[-1] == 5 and per_layer[0] > 120
