"""gate_evict on a CPU against its equation: the same state to the bit, and where the equation is not asked."""

from itertools import accumulate, pairwise
from unittest import mock

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from retention_gates.kernels.dispatch import VARIABLE
from retention_gates.kernels.gate_evict import GateOutput, SlotState, cpu, gate_evict, naive


@pytest.fixture(autouse=True)
def no_form_is_asked_for(monkeypatch):
    monkeypatch.delenv(VARIABLE, raising=False)


def empty_state(batch, offsets, seen=0):
    slots = offsets[-1]
    return [
        torch.zeros(batch, slots, 3),
        torch.zeros(batch, slots, 2),
        torch.full((batch, slots), float("nan")),  # an empty slot's score must not matter
        torch.full((batch, slots), -1),
        torch.zeros(batch, slots, dtype=torch.bool),
        torch.full((batch,), seen),
        torch.tensor(seen),
    ]


def random_token(batch, heads, generator, levels=5):
    """Few scores, so that priorities are often equal."""
    key, value = (torch.randn(batch, heads, 1, width, generator=generator) for width in (3, 2))
    return key, value, -torch.randint(0, levels, (batch, heads), generator=generator) / 7.0


@st.composite
def cases(draw):
    budgets = draw(st.lists(st.integers(3, 9), min_size=1, max_size=3))
    return dict(
        budgets=draw(st.sampled_from([budgets, budgets[:1] * len(budgets)])),
        linear_in_age=draw(st.booleans()),
        buffer_size=draw(st.sampled_from([1, 1, 1, 2])),
        recent=draw(st.sampled_from([None, None, None, 2])),
        protected=draw(st.sampled_from([None, [], [(0, 2)], [(0, 1), (17, 18)]])),
        padding=draw(st.lists(st.integers(0, 24), max_size=3)),
        seen=draw(st.sampled_from([0, 2**33])),
        seed=draw(st.integers(0, 2**31)),
    )


@given(cases())
def test_equals_the_equation(case):
    heads, generator = len(case["budgets"]), torch.Generator().manual_seed(case["seed"])
    offsets = tuple(accumulate((budget + case["buffer_size"] for budget in case["budgets"]), initial=0))
    rule = {name: case[name] for name in ("linear_in_age", "buffer_size")}
    rule["recent"] = None if case["recent"] is None else torch.full((heads,), case["recent"])
    if case["protected"] is not None:
        rule["protected"] = torch.tensor(case["protected"], dtype=torch.int64).view(-1, 2)
    states = [empty_state(2, offsets, case["seen"]) for _ in range(2)]
    for step in range(25):
        token = random_token(2, heads, generator)
        mask = None
        if step in case["padding"] and not case["seen"]:
            mask = torch.rand(2, step + 1, generator=generator) < 0.7
        naive.gate_evict(SlotState(*states[0]), *token, offsets, padding_mask=mask, **rule)
        gate_evict(SlotState(*states[1]), *token, offsets, padding_mask=mask, **rule)
        for expected, got in zip(*states, strict=True):
            assert torch.equal(expected.nan_to_num(1.0), got.nan_to_num(1.0))


@pytest.mark.parametrize("offsets", [(0, 5, 10), (0, 3, 10)])
def test_a_full_memory_does_without_the_equation(offsets, monkeypatch):
    generator = torch.Generator().manual_seed(0)
    weight, bias = torch.randn(2, 4, generator=generator), torch.randn(2, generator=generator)
    protected = torch.tensor([[0, 1], [20, 21]])
    states = [empty_state(1, offsets) for _ in range(2)]
    asked = []
    for step in range(30):
        key, value, _ = random_token(1, 2, generator)
        gate = GateOutput(torch.randn(1, 4, generator=generator), weight, bias)
        with mock.patch.object(naive, "gate_evict", wraps=naive.gate_evict) as equation:
            gate_evict(SlotState(*states[0]), key, value, gate, offsets, linear_in_age=True, protected=protected)
        asked += [step] * equation.call_count
        with monkeypatch.context() as context:
            context.setenv(VARIABLE, "naive")
            gate_evict(SlotState(*states[1]), key, value, gate, offsets, linear_in_age=True, protected=protected)
        assert all(torch.equal(one.nan_to_num(1.0), other.nan_to_num(1.0)) for one, other in zip(*states, strict=True))
    longest = max(stop - start for start, stop in pairwise(offsets))
    assert asked == [*range(longest), 20]  # until the longest head is full, and for the protected token


def test_a_traced_step_takes_the_equation():
    offsets, generator = (0, 3, 8), torch.Generator().manual_seed(0)
    states = [empty_state(1, offsets) for _ in range(2)]
    compiled = torch.compile(gate_evict, fullgraph=True, backend="aot_eager")
    with mock.patch.object(cpu, "gate_evict", side_effect=AssertionError):
        for _ in range(12):
            token = random_token(1, 2, generator)
            compiled(SlotState(*states[0]), *token, offsets, linear_in_age=True)
            naive.gate_evict(SlotState(*states[1]), *token, offsets, linear_in_age=True)
    assert all(torch.equal(one.nan_to_num(1.0), other.nan_to_num(1.0)) for one, other in zip(*states, strict=True))
