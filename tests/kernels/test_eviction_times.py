"""eviction_times against plain Python, and the cases worked by hand."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from plain_eviction import PlainHead

from retention_gates.kernels.eviction_times import eviction_times, naive


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
def cases(draw):
    tokens = draw(st.integers(1, 150))
    heads = draw(st.integers(1, 3))
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
        (dict(recent=torch.tensor([1, 4])), "protect fewer"),
        (dict(protected=torch.ones(1, 4, dtype=torch.bool)), "protect fewer"),
    ],
)
def test_bad_arguments(change, message):
    arguments = dict(score=torch.zeros(1, 2, 4), budgets=torch.tensor([3, 3]), linear_in_age=True) | change
    with pytest.raises(ValueError, match=message):
        eviction_times(**arguments)
