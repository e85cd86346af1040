"""gate_evict's kernel against its equation in plain torch: the same victims in the same slots, after every token."""

import os
from itertools import accumulate, pairwise
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from retention_gates.kernels.dispatch import VARIABLE
from retention_gates.kernels.gate_evict import GateOutput, SlotState, fused, gate_evict, naive

interpreted = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="needs Triton's interpreter")
DEVICES = [pytest.param("cpu", marks=interpreted), pytest.param("cuda", marks=pytest.mark.gpu)]
NAMES = ("keys", "values", "score", "positions", "pending", "start", "seen")


def empty_state(batch, sizes, head_dim=8, value_dim=4, dtype=torch.float32, seen=0):
    offsets = tuple(accumulate(sizes, initial=0))
    slots = offsets[-1]
    return [
        torch.full((batch, slots, head_dim), float("nan"), dtype=dtype),
        torch.full((batch, slots, value_dim), float("nan"), dtype=dtype),
        torch.full((batch, slots), float("nan")),  # an empty slot's score must not matter
        torch.full((batch, slots), -1),
        torch.zeros(batch, slots, dtype=torch.bool),
        torch.full((batch,), seen),
        torch.tensor(seen),
    ], offsets


def check_same(naive_state, fused_state):
    """Everything but what empty slots hold."""
    held = naive_state[3] >= 0
    for name, expected, got in zip(NAMES, naive_state, fused_state, strict=True):
        if name in ("keys", "values", "score"):
            expected, got = expected[held], got[held]
        assert torch.equal(expected, got), name


def run_both(device, tokens, state, offsets, masks=None, gates=None, **rule):
    """Token by token through both forms; a token is (key, value, score)."""
    states = [[tensor.clone().to(device) for tensor in state] for _ in range(2)]
    rule = {name: x.to(device) if isinstance(x, torch.Tensor) else x for name, x in rule.items()}
    for step, token in enumerate(tokens):
        token = [x.to(device) for x in token]
        mask = None if masks is None else masks[step].to(device)
        naive.gate_evict(SlotState(*states[0]), *token, offsets, padding_mask=mask, **rule)
        fused.gate_evict(SlotState(*states[1]), *token, offsets, padding_mask=mask, **rule)
        check_same(*states)
    return states[1]


def random_tokens(count, batch, heads, generator, levels=5, head_dim=8, value_dim=4, dtype=torch.float32):
    """Few scores, so that priorities are often equal."""

    def normal(width):
        return torch.randn(batch, heads, 1, width, generator=generator).to(dtype)

    for _ in range(count):
        score = -torch.randint(0, levels, (batch, heads), generator=generator) / 7.0
        yield normal(head_dim), normal(value_dim), score


@st.composite
def cases(draw, most_tokens=16, most_heads=2):
    heads, buffer_size, protected = draw(st.integers(1, most_heads)), draw(st.integers(1, 4)), draw(st.integers(0, 2))
    equal = draw(st.booleans())
    budgets = draw(st.lists(st.integers(protected + 1, 9), min_size=1 if equal else heads, max_size=heads))
    budgets = [budgets[0]] * heads if equal else budgets
    recent = None
    if draw(st.booleans()):
        recent = torch.tensor([draw(st.integers(0, budget - protected)) for budget in budgets])
    count = draw(st.integers(1, most_tokens))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    masks = None
    if draw(st.booleans()):
        valid = torch.rand(2, count, generator=generator) < 0.8
        valid[1, : draw(st.integers(0, count))] = False
        # what a later mask calls padding goes
        later = draw(st.integers(1, count))
        masks = [valid[:, : step + 1].clone() for step in range(count)]
        for mask in masks[later:]:
            mask[0, :later] &= torch.rand(later, generator=generator) < 0.7
    first = draw(st.sampled_from([0, 0, 5, 2**33])) if masks is None else 0
    spans = draw(st.sampled_from([[(0, protected)], [(1, 1 + protected), (3, 3)], []]))
    return dict(
        sizes=[budget + buffer_size for budget in budgets],
        tokens=list(random_tokens(count, 2, heads, generator)),
        seen=first,
        masks=masks,
        linear_in_age=draw(st.booleans()),
        buffer_size=buffer_size,
        recent=recent,
        protected=torch.tensor(spans, dtype=torch.int64).view(-1, 2) if spans else None,
    )


def check_case(case, device):
    state, offsets = empty_state(2, case.pop("sizes"), seen=case.pop("seen"))
    tokens, masks = case.pop("tokens"), case.pop("masks")
    run_both(device, tokens, state, offsets, masks, **case)


@interpreted
@settings(max_examples=12)
@given(cases())
def test_equals_naive(case):
    with mock.patch.object(fused, "LANES", 4):  # several rounds, and what the interpreter reduces in less time
        check_case(case, "cpu")


@pytest.mark.gpu
@settings(max_examples=40)
@given(cases(most_tokens=60, most_heads=4))
def test_equals_naive_on_a_gpu(case):
    check_case(case, "cuda")


@pytest.mark.parametrize("device", DEVICES)
def test_a_head_longer_than_a_program_reads_at_once(device, monkeypatch):
    monkeypatch.setattr(fused, "LANES", 4)
    monkeypatch.setattr(fused, "ROUNDS", (1, 2))
    generator = torch.Generator().manual_seed(0)
    state, offsets = empty_state(1, [19, 11])
    rule = dict(linear_in_age=True, protected=torch.tensor([[0, 4]]))
    run_both(device, random_tokens(24, 1, 2, generator), state, offsets, buffer_size=1, **rule)
    run_both(device, random_tokens(24, 1, 2, generator), state, offsets, buffer_size=7, **rule)


@pytest.mark.parametrize("device", DEVICES)
def test_a_gate_is_finished_in_the_kernel(device):
    """log_beta from features, over all magnitudes: half-lives of a token to 1e8."""
    torch.manual_seed(0)
    heads, width = 12, 20
    state, offsets = empty_state(2, [4] * heads)
    state = [tensor.to(device) for tensor in state]
    key, value = torch.randn(2, heads, 1, 8, device=device), torch.randn(2, heads, 1, 4, device=device)
    hidden, weight = torch.randn(2, width, device=device), 0.3 * torch.randn(heads, width, device=device)
    bias = torch.linspace(-30, 18, heads, device=device)
    form = "fused" if device == "cpu" else ""
    with mock.patch.dict(os.environ, {VARIABLE: form}):
        gate_evict(SlotState(*state), key, value, GateOutput(hidden, weight, bias), offsets, linear_in_age=True)
    got = torch.stack([state[2][:, start] for start in offsets[:-1]], dim=1)
    exact = torch.nn.functional.logsigmoid(hidden.double() @ weight.double().T + bias.double())
    torch.testing.assert_close(got.double(), exact, rtol=2e-5, atol=0)  # the logit's rounding, which exp magnifies


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(
    ("batch", "sizes", "buffer_size"),
    [
        (4, [1025] * 8, 1),
        (1, [4097] * 4, 1),
        (3, [33, 20_000, 129, 2], 1),
        (2, [1152] * 8, 128),
        (256, [65] * 8, 1),
        (5, [300, 77, 1500], 16),
    ],
)
def test_long_runs_on_a_gpu(batch, sizes, buffer_size, dtype):
    generator = torch.Generator().manual_seed(1)
    state, offsets = empty_state(batch, sizes, 128, 64, dtype)
    sizes = torch.tensor(sizes)
    # full from the start, of distinct positions in any order
    first = 30_000
    state[6].fill_(first)
    for head, (start, stop) in enumerate(pairwise(offsets)):
        for row in range(batch):
            state[3][row, start:stop] = torch.randperm(first, generator=generator)[: sizes[head]]
    state[4][:, [start + 1 for start in offsets[:-1]]] = True
    state[0].zero_(), state[1].zero_()
    state[2].copy_(-torch.rand(state[2].shape, generator=generator))
    tokens = random_tokens(2 * buffer_size + 20, batch, len(sizes), generator, 5, 128, 64, dtype)
    run_both("cuda", tokens, state, offsets, linear_in_age=True, buffer_size=buffer_size)


@pytest.mark.gpu
def test_a_captured_step_is_replayed():
    generator = torch.Generator().manual_seed(2)
    state, offsets = empty_state(2, [9, 30, 4])
    tokens = list(random_tokens(60, 2, 3, generator))
    expected = run_both("cuda", tokens, state, offsets, linear_in_age=True, protected=torch.tensor([[0, 1]]).cuda())
    state = [tensor.cuda() for tensor in state]
    inputs = [x.cuda() for x in tokens[0]]
    protected = torch.tensor([[0, 1]]).cuda()
    saved = [tensor.clone() for tensor in state]
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        gate_evict(SlotState(*state), *inputs, offsets, linear_in_age=True, protected=protected)
    for tensor, before in zip(state, saved, strict=True):
        tensor.copy_(before)
    for token in tokens:
        for buffer, new in zip(inputs, token, strict=True):
            buffer.copy_(new)
        graph.replay()
    check_same(expected, state)


@interpreted
def test_compiles_without_a_break(monkeypatch):
    monkeypatch.setenv(VARIABLE, "fused")
    generator = torch.Generator().manual_seed(3)
    state, offsets = empty_state(1, [3, 5])
    compiled = torch.compile(gate_evict, fullgraph=True, backend="aot_eager")
    tokens = list(random_tokens(8, 1, 2, generator))
    expected = run_both("cpu", tokens, state, offsets, linear_in_age=True)
    for token in tokens:
        compiled(SlotState(*state), *token, offsets, linear_in_age=True)
    check_same(expected, state)


@interpreted
def test_strided_state_is_refused(monkeypatch):
    monkeypatch.setenv(VARIABLE, "fused")
    state, offsets = empty_state(1, [3, 5])
    (token,) = random_tokens(1, 1, 2, torch.Generator().manual_seed(3))
    state[0] = state[0].transpose(1, 2).contiguous().transpose(1, 2)
    with pytest.raises(ValueError, match="contiguous"):
        gate_evict(SlotState(*state), *token, offsets, linear_in_age=True)


def test_few_kernels_for_all_budgets():
    """Calibrated budgets differ in every layer; each kernel takes a second to compile."""
    shapes = {largest: fused.shape_of(largest) for largest in range(1, 20_000, 7)}
    assert all(32 * warps * rounds * passes >= largest for largest, (warps, rounds, passes) in shapes.items())
    assert len({(warps, rounds, passes == 1) for warps, rounds, passes in shapes.values()}) <= 16
