"""A decoding step through the kernels: what it launches, and that it keeps and says what plain torch does."""

import os

import pytest
import torch
from gated_models import gated_model, step_by_step, token_ids
from layer_calls import attend
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from retention_gates.gates.cache import BoundedCache
from retention_gates.gates.cache.slot_layer import SlotLayer
from retention_gates.gates.policies import POLICIES
from retention_gates.gates.policies.eviction_rule import EvictionRule
from retention_gates.kernels.dispatch import VARIABLE
from retention_gates.kernels.gate_evict import GateOutput

interpreted = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="needs Triton's interpreter")
DEVICES = [pytest.param("cpu", marks=interpreted), pytest.param("cuda", marks=pytest.mark.gpu)]
VIEWS = {"aten::select", "aten::slice", "aten::detach", "aten::view", "aten::transpose"}


class Ops(TorchDispatchMode):
    """Names of the operators that run, without those that only look at memory in another way."""

    def __init__(self):
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function._schema.name
        if name not in VIEWS:
            self.names.append(name)
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("takes_gate_output", [False, True])
@pytest.mark.parametrize("with_mask", [False, True])
@pytest.mark.parametrize("device", DEVICES)
def test_a_step_of_a_layer_is_two_operators(device, with_mask, takes_gate_output, monkeypatch):
    monkeypatch.setenv(VARIABLE, "fused")
    owner = nn.Identity()
    layer = SlotLayer(EvictionRule(POLICIES["retention"], (3, 5), 1, ((0, 1), (2, 3)), 0, 0), owner)
    key, value = torch.randn(2, 2, 2, 1, 16, device=device)
    query = torch.randn(2, 4, 1, 16, device=device)
    log_beta = -torch.rand(2, 2, 1, device=device)
    if takes_gate_output:
        log_beta = GateOutput(*(torch.randn(shape, device=device) for shape in ((2, 8), (2, 8), (2,))))
    for step in range(8):
        mask = torch.ones(2, step + 1, dtype=torch.bool, device=device) if with_mask else None
        with Ops() as ops:
            attend(layer, owner, log_beta, query, key, value, mask)
    names = [name for name in ops.names if name.startswith("retention_gates::")]
    inside = {"aten::empty.memory_format", "aten::new_empty", "aten::empty"}  # what the kernels' callers allocate
    assert names == ["retention_gates::gate_evict", "retention_gates::ragged_decode_attention"]
    assert {name for name in ops.names if name not in names} <= inside
    assert layer.seen == 8


@interpreted
@pytest.mark.parametrize("policy", ["retention", "streaming_llm", "h2o"])
def test_a_model_keeps_and_says_the_same(policy, monkeypatch):
    check_model("cpu", policy, 6, monkeypatch, num_hidden_layers=2)


@pytest.mark.gpu
@pytest.mark.parametrize("policy", ["retention", "streaming_llm", "random", "key_norm", "h2o", "snapkv"])
def test_a_model_keeps_and_says_the_same_on_a_gpu(policy, monkeypatch):
    check_model("cuda", policy, 200, monkeypatch)


def check_model(device, policy, steps, monkeypatch, **changes):
    """A prompt with left padding, single tokens and a short run, through both forms."""
    model = gated_model(**changes).to(device)
    ids = token_ids(2, steps + 20).to(device)
    mask = torch.ones_like(ids)
    mask[1, :3] = 0
    budgets = [[6, 10]] * len(model.base_model.model.model.layers)
    outputs, caches = [], []
    for form in ("naive", "fused"):
        monkeypatch.setenv(VARIABLE, form)
        cache = BoundedCache(model, memory_size=8, policy=policy, budgets=budgets)
        logits = []
        with torch.no_grad():
            seen = 0
            for length in (12, *[1] * (steps // 2), 3, *[1] * (steps - steps // 2)):
                seen += length
                part = ids[:, seen - length : seen]
                logits.append(model(input_ids=part, past_key_values=cache, attention_mask=mask[:, :seen]).logits)
        outputs.append(torch.cat(logits, dim=1))
        caches.append(cache)
    for one, other in zip(*(cache.gated_layers for cache in caches), strict=True):
        assert all(torch.equal(one.positions(head), other.positions(head)) for head in range(2))
        assert torch.equal(one.start, other.start) and one.seen == other.seen
    real = mask[:, :seen].bool()
    torch.testing.assert_close(outputs[1][real], outputs[0][real], rtol=1e-3, atol=1e-4)


@pytest.mark.gpu
def test_a_step_never_waits_for_the_device():
    model = gated_model().cuda()
    cache = BoundedCache(model, memory_size=8)
    step_by_step(model, token_ids(2, 4).cuda(), cache)
    ids = token_ids(2, 1).cuda()
    torch.cuda.set_sync_debug_mode("error")
    try:
        with torch.no_grad():
            model(input_ids=ids, past_key_values=cache)
    finally:
        torch.cuda.set_sync_debug_mode("default")
