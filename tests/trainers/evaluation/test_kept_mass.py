"""Measured budgets: kept masses by an independent count, and the best division by trying all."""

from itertools import product

import pytest
import torch
from gated_models import gated_model, token_ids
from hypothesis import given, settings
from hypothesis import strategies as st

from retention_gates import find_gated_model
from retention_gates.gates.cache import BoundedCache
from retention_gates.gates.policies import POLICIES
from retention_gates.trainers.evaluation.contenders import MEASURED, Contender, contenders
from retention_gates.trainers.evaluation.kept_mass import best_budgets, kept_masses, with_measured_budgets


@pytest.mark.parametrize("policy", ["streaming_llm", "snapkv", "key_norm"])
@torch.no_grad()
def test_kept_mass_is_the_attention_that_falls_on_what_a_cache_holds(policy):
    """The first layer's queries and keys don't depend on evictions: the full attention and a decode tell its mass."""
    model, rows, size = gated_model(), token_ids(2, 40), 12
    kept = kept_masses(model, POLICIES[policy], [size, 20], rows)
    assert list(kept) == [size, 20] and kept[size].shape == kept[20].shape
    assert (kept[size] > 0).all() and (kept[20] < 1).all() and (kept[20].mean() > kept[size].mean())
    base = find_gated_model(model).model
    heads = kept[size].shape[1]
    with model.disable_adapter():
        base.set_attn_implementation("eager")
        weights = base(input_ids=rows, output_attentions=True, use_cache=False).attentions[0].double()  # [B, HQ, T, T]
        base.set_attn_implementation("sdpa")
    weights = weights.unflatten(1, (heads, -1)).mean(2)
    expected = torch.zeros(2, heads, dtype=torch.float64)
    for row in range(2):
        cache = BoundedCache(model, size, policy=policy, budgets="uniform")
        for step in range(40):
            held = (
                [set()] * heads if step == 0 else [set(p.tolist()) for p in map(cache_positions(cache), range(heads))]
            )
            if step >= 20:
                for head in range(heads):
                    seen = sorted({p for p in held[head] if p >= 0} | {step})
                    expected[row, head] += weights[row, head, step, seen].sum() / 20
            model(input_ids=rows[row : row + 1, step : step + 1], past_key_values=cache)
    torch.testing.assert_close(kept[size][0], expected.mean(0), atol=1e-5, rtol=1e-5)


def cache_positions(cache):
    return lambda head: cache.gated_layers[0].positions(head)[0]


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.lists(st.floats(0, 1), min_size=3, max_size=3), min_size=2, max_size=4),
    st.integers(2, 4),
    st.integers(1, 2),
)
def test_no_other_division_keeps_more(gains, memory_size, least):
    """Concave kept masses at sizes 2, 4, 8: all divisions with these sizes and their neighbours are tried."""
    curves = []
    for head in gains:  # falling gains make a concave curve
        a, b, c = sorted(head, reverse=True)
        curves.append([2 * a, 2 * a + 2 * b, 2 * a + 2 * b + 4 * c])
    kept = {size: torch.tensor([[curve[i] for curve in curves]]).double() for i, size in enumerate((2, 4, 8))}
    (found,) = best_budgets(kept, memory_size, least)
    assert sum(found) == memory_size * len(curves) and min(found) >= least

    def mass(entries):
        points = [[0.0, *curve] for curve in curves]
        total = 0.0
        for entry, ys in zip(entries, points, strict=True):
            for x0, x1, y0, y1 in zip((0, 2, 4), (2, 4, 8), ys, ys[1:], strict=False):
                if x0 <= entry <= x1:
                    total += y0 + (y1 - y0) * (entry - x0) / (x1 - x0)
                    break
            else:
                total += ys[-1]
        return total

    most = max(
        mass(entries)
        for entries in product(range(least, 9), repeat=len(curves))
        if sum(entries) == memory_size * len(curves)
    )
    assert mass(found) == pytest.approx(most, abs=1e-6)


def test_a_curve_that_is_not_concave_is_divided_by_its_hull():
    # the second head gains nothing before 8 entries: a greedy division by measured steps would never give it any
    kept = {4: torch.tensor([[0.3, 0.0]]), 8: torch.tensor([[0.35, 0.9]])}
    assert best_budgets(kept, 4, 1) == [[1, 7]] and best_budgets(kept, 6, 1) == [[4, 8]]


def test_heads_that_evict_alike_have_equal_budgets():
    kept = {4: torch.tensor([[0.1, 0.9], [0.2, 0.1]]), 16: torch.tensor([[0.2, 1.0], [0.9, 0.8]])}
    budgets = best_budgets(kept, 8, 2, alike=True)
    assert all(len(set(row)) == 1 for row in budgets) and budgets[1][0] > budgets[0][0]
    assert sum(map(sum, budgets)) == 8 * 4


def test_contenders_with_measured_budgets_run_and_keep_more():
    model, rows = gated_model(), token_ids(2, 120)
    chosen = contenders(["h2o", "tova", "retention"], [16], ["uniform", MEASURED])
    said = []
    measured = with_measured_budgets(model, chosen, rows, said.append)
    assert said == ["h2o", "tova", "retention"] and [c.budgets for c in measured] == ["uniform", MEASURED] * 3
    for contender in measured:
        cache = BoundedCache(model, 16, policy=contender.policy, budgets=contender.division)
        assert sum(map(sum, cache.budgets)) == 16 * sum(map(len, cache.budgets))
        assert contender.budgets == "uniform" or any(len({*row}) > 1 or row[0] != 16 for row in cache.budgets)
    with pytest.raises(ValueError, match="Measured budgets of 'h2o' have no numbers"):
        Contender("h2o", 16, MEASURED).division  # noqa: B018
