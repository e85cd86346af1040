"""eviction_times against plain Python, and the cases worked by hand."""

import os
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from plain_eviction import PlainHead

from retention_gates.kernels.dispatch import VARIABLE
from retention_gates.kernels.eviction_times import eviction_times, naive

interpreted = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="needs Triton's interpreter")


def plain_times(score, budgets, linear_in_age, buffer_size, protected, recent, valid):
    batch, heads, tokens = score.shape
    result = torch.zeros(batch, heads, tokens, dtype=torch.int64)
    for row in range(batch):
        for head in range(heads):
            plain = PlainHead(budgets[head], linear_in_age, buffer_size, recent[head])
            plain.protected = {i for i in range(tokens) if protected[row][i]}
            for step in range(tokens):
                for position in plain.read([score[row, head, step].item()], [step], [valid[row][step]])[0]:
                    result[row, head, position] = step + 1  # seen at this step, so not before the next unseen
    return result


@st.composite
def cases(draw, most_tokens=150, most_heads=3):
    tokens = draw(st.integers(1, most_tokens))
    heads = draw(st.integers(1, most_heads))
    buffer_size = draw(st.integers(1, 5))
    linear = draw(st.booleans())
    protected_count = draw(st.integers(0, 3))
    budgets = draw(st.lists(st.integers(protected_count + 1, 40), min_size=heads, max_size=heads))
    recent = [draw(st.integers(0, budget - protected_count)) for budget in budgets]
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    # few values, so that products are often equal
    score = -torch.randint(0, draw(st.integers(1, 8)) + 1, (2, heads, tokens), generator=generator) / 7.0
    padding = draw(st.integers(0, tokens))
    valid = torch.arange(tokens).expand(2, tokens) >= torch.tensor([[0], [padding]])
    valid = valid & (torch.rand(2, tokens, generator=generator) < draw(st.sampled_from([0.7, 1.0])))
    protected = torch.zeros(2, tokens, dtype=torch.bool)
    for row in range(2):
        protected[row, torch.randperm(tokens, generator=generator)[:protected_count]] = True
    return score, budgets, linear, buffer_size, protected, recent, valid


@given(cases())
def test_equals_plain_python(case):
    check_against_plain_python(case)


@interpreted
@settings(max_examples=25)
@given(cases(most_tokens=40, most_heads=2))
def test_fused_equals_plain_python(case):
    with mock.patch.dict(os.environ, {VARIABLE: "fused"}):
        check_against_plain_python(case)


def check_against_plain_python(case):
    score, budgets, linear, buffer_size, protected, recent, valid = case
    times = eviction_times(
        score,
        torch.tensor(budgets),
        linear_in_age=linear,
        buffer_size=buffer_size,
        protected=protected,
        recent=torch.tensor(recent),
        valid=valid,
    )
    plain = plain_times(score, budgets, linear, buffer_size, protected, recent, valid)
    # plain Python sees nothing after the last step; a token seen there has the time T in both
    assert torch.equal(times, plain)


@pytest.mark.parametrize("block", [1, 3, 64])
def test_length_of_a_block_changes_nothing(block, monkeypatch):
    torch.manual_seed(0)
    score = -torch.rand(2, 3, 131)
    arguments = dict(linear_in_age=True, buffer_size=2)
    expected = eviction_times(score, torch.tensor([5, 17, 64]), **arguments)
    monkeypatch.setattr(naive, "BLOCK", block)
    assert torch.equal(eviction_times(score, torch.tensor([5, 17, 64]), **arguments), expected)


def test_worked_by_hand():
    # step 2: ages 2, 1, 0 times the scores -1, -3, -9 are -2, -3, 0: token 1 goes. step 3: token 0 (-3), 2 (-9), 3 (0)
    score = torch.tensor([[[-1.0, -3.0, -9.0, -9.0]]])
    assert eviction_times(score, torch.tensor([2]), linear_in_age=True).tolist() == [[[4, 3, 4, 4]]]
    # by score alone token 2 goes at once; then 1 is lowest but for 3
    assert eviction_times(score, torch.tensor([2]), linear_in_age=False).tolist() == [[[4, 4, 3, 4]]]
    longer = torch.tensor([[[-1.0, -3.0, -9.0, -9.0, -9.0]]])
    assert eviction_times(longer, torch.tensor([2]), linear_in_age=True).tolist() == [[[5, 3, 4, 5, 5]]]


def test_ties_go_to_the_lowest_position():
    score = torch.zeros(1, 1, 6)
    for linear in (True, False):
        times = eviction_times(score, torch.tensor([3]), linear_in_age=linear)
        assert times.tolist() == [[[4, 5, 6, 6, 6, 6]]]


def test_budget_of_the_length_evicts_nothing():
    times = eviction_times(-torch.rand(2, 2, 9), torch.tensor([9, 9]), linear_in_age=True)
    assert (times == 9).all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(score=torch.zeros(1, 2, 4, dtype=torch.float64)), "float32"),
        (dict(score=torch.zeros(2, 4)), r"\[B, H, T\]"),
        (dict(score=torch.full((1, 2, 4), float("nan"))), "NaN"),
        (dict(score=torch.full((1, 2, 4), -float("inf"))), "between"),
        (dict(budgets=torch.tensor([3])), r"\[H\]"),
        (dict(budgets=torch.tensor([3, 0])), "at least 1"),
        (dict(budgets=torch.tensor([3.0, 3.0])), "int64"),
        (dict(buffer_size=0), "buffer_size"),
        (dict(protected=torch.zeros(1, 3, dtype=torch.bool)), "protected"),
        (dict(protected=torch.zeros(1, 4)), "bool"),
        (dict(valid=torch.ones(1, 4)), "bool"),
        (dict(recent=torch.tensor([1])), r"\[H\]"),
        (dict(recent=torch.tensor([1.0, 1.0])), "recent must be torch.int64"),
        (dict(recent=torch.tensor([1, 4])), "protect fewer"),
        (dict(protected=torch.ones(1, 4, dtype=torch.bool)), "protect fewer"),
    ],
)
def test_bad_arguments(change, message):
    arguments = dict(score=torch.zeros(1, 2, 4), budgets=torch.tensor([3, 3]), linear_in_age=True) | change
    with pytest.raises(ValueError, match=message):
        eviction_times(**arguments)


@interpreted
def test_fused_worked_by_hand(monkeypatch):
    monkeypatch.setenv(VARIABLE, "fused")
    test_worked_by_hand()
    test_ties_go_to_the_lowest_position()
    test_budget_of_the_length_evicts_nothing()


@interpreted
def test_zeros_of_both_signs_are_equal(monkeypatch):
    score = torch.tensor([[[0.0, -0.0, 0.0, -0.0, -0.0, 0.0]]])
    for form in ("naive", "fused"):
        monkeypatch.setenv(VARIABLE, form)
        for linear in (True, False):
            times = eviction_times(score, torch.tensor([2]), linear_in_age=linear, recent=torch.tensor([0]))
            assert times.tolist() == [[[3, 4, 5, 6, 6, 6]]]


@interpreted
def test_scores_of_every_sign_and_size(monkeypatch):
    """The order of floats as integers: subnormal, huge, of both signs."""
    generator = torch.Generator().manual_seed(0)
    exponents = torch.randint(-149, 90, (2, 2, 40), generator=generator)
    score = torch.randn(2, 2, 40, generator=generator) * 2.0**exponents
    for linear in (True, False):
        arguments = dict(linear_in_age=linear, buffer_size=2)
        monkeypatch.setenv(VARIABLE, "naive")
        expected = eviction_times(score, torch.tensor([3, 20]), **arguments)
        monkeypatch.setenv(VARIABLE, "fused")
        assert torch.equal(eviction_times(score, torch.tensor([3, 20]), **arguments), expected)


@pytest.mark.gpu
@pytest.mark.parametrize("linear", [True, False])
@pytest.mark.parametrize("buffer_size", [1, 7])
@pytest.mark.parametrize(("tokens", "budgets"), [(4096, [12, 33, 256, 1024]), (257, [40, 200, 256, 2048]), (1, [5])])
def test_fused_equals_naive_on_a_gpu(monkeypatch, tokens, budgets, buffer_size, linear):
    """Ragged budgets at real lengths, with few values for many ties and without, left padding and gaps."""
    generator = torch.Generator("cuda").manual_seed(tokens)
    shape = (3, len(budgets), tokens)
    spread = -torch.rand(shape, generator=generator, device="cuda").pow(4)
    tied = -torch.randint(0, 6, shape, generator=generator, device="cuda") / 7.0
    steps = torch.arange(tokens, device="cuda")
    protected = (steps < min(4, tokens)).expand(3, tokens)
    recent = torch.tensor([budget // 4 for budget in budgets], device="cuda")
    valid = steps >= torch.tensor([[0], [1], [tokens // 2]], device="cuda")
    valid = valid & (torch.rand(3, tokens, generator=generator, device="cuda") < 0.9)
    for score in (spread, tied):
        for options in ({}, dict(protected=protected), dict(protected=protected, recent=recent, valid=valid)):
            options |= dict(linear_in_age=linear, buffer_size=buffer_size)
            times = {}
            for form in ("naive", "fused"):
                monkeypatch.setenv(VARIABLE, form)
                times[form] = eviction_times(score, torch.tensor(budgets, device="cuda"), **options)
            assert torch.equal(times["naive"], times["fused"])
