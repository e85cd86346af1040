"""Layers of a captured step that are computed in fewer launches."""

import sys
import threading

import pytest
import torch
from gated_models import gated_model, token_ids
from tape import TapeRecorder
from torch import nn

from retention_gates import BoundedCache, find_gated_model
from retention_gates.gates.decode import step as decode_step
from retention_gates.gates.decode.watch import MOST_ROWS, Watch

GREEDY = dict(do_sample=False, max_new_tokens=7)


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request, monkeypatch):
    monkeypatch.setitem(decode_step.RECORDERS, "cpu", TapeRecorder)
    monkeypatch.setenv("RETENTION_GATES_KERNELS", "fused")  # on a CPU in Triton's interpreter
    return request.param


def half(family, device, **changes):
    return gated_model(family, **changes).half().to(device)


def replaced_layers(model, ids):
    """What of a captured step is computed otherwise, with the same tokens as without a capture."""
    cache = BoundedCache(model, 6)
    graphed = model.generate(input_ids=ids, past_key_values=cache, **GREEDY)
    plain = model.generate(input_ids=ids, past_key_values=BoundedCache(model, 6, graph=False), **GREEDY)
    assert torch.equal(graphed, plain) and cache.decode_step.captures
    return cache.decode_step.layers


def names(model, group):
    paths = {module: name for name, module in model.named_modules()}
    return [paths[layer].split(".")[-1] for layer in group.layers]


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_a_step_with_all_together(device, family):
    """The gate's first layer, q, k and v are one product, and so are the two that the activation multiplies."""
    model, ids = half(family, device, num_hidden_layers=2), token_ids(2, 9).to(device)
    layers = replaced_layers(model, ids)
    groups = [names(model, group) for group in layers.groups]
    layer = [["hidden", "q_proj", "k_proj", "v_proj"], ["o_proj"], ["gate_proj", "up_proj"], ["down_proj"]]
    assert groups == [*layer, *layer, ["lm_head"]]
    norms = [module for name, module in model.named_modules() if "norm" in name]
    assert len(norms) == (9 if family == "qwen3" else 5) and set(layers.norms) == set(norms)
    assert layers.rotating == [sys.modules[type(find_gated_model(model).model).__module__]]
    assert not [module for module in model.modules() if isinstance(module, nn.Linear) and "forward" in vars(module)]


@pytest.mark.parametrize("family", ["phi3", "glm4", "cohere2"])
def test_other_ways_of_rotating(device, family):
    """phi3 and glm4 rotate some channels only, glm4 and cohere2 neighbours: what differs is left alone."""
    model, ids = half(family, device), token_ids(2, 9).to(device)
    layers = replaced_layers(model, ids)
    assert bool(layers.rotating) == (family == "phi3")


@pytest.mark.parametrize("family", ["gemma2", "gpt_oss", "granite", "qwen3_moe", "qwen3_next"])
def test_other_families(device, family):
    """Norms, experts and layers of other kinds between those that are computed otherwise."""
    model, ids = half(family, device), token_ids(2, 9).to(device)
    layers = replaced_layers(model, ids)
    assert layers.groups


def test_a_second_cache_finds_the_same_functions(device):
    """Else a compiled step would be compiled again."""
    model, ids = half("llama", device, num_hidden_layers=1), token_ids(1, 5).to(device)
    found = []
    for _ in range(2):
        cache = BoundedCache(model, 4)
        model.generate(input_ids=ids, past_key_values=cache, **GREEDY)
        found.append(cache.decode_step.layers)
    assert found[0] is found[1]


def test_float32_is_left_to_torch(device):
    model = gated_model(num_hidden_layers=1).to(device)
    cache = BoundedCache(model, 4)
    model.generate(input_ids=token_ids(1, 5).to(device), past_key_values=cache, **GREEDY)
    assert cache.decode_step.captures and not cache.decode_step.layers


@pytest.fixture
def layers():
    torch.manual_seed(0)
    first, second, twice = (nn.Linear(16, 8, dtype=torch.float16) for _ in range(3))
    return nn.ModuleList([first, second, twice])


def step(layers, x):
    other = x * 2
    return [layers[0](x), layers[2](other), layers[1](x), layers[2](x)]


def watched(layers, x):
    watch = Watch()
    with watch.watching(layers):
        step(layers, x)
    return watch.found(layers)


@torch.no_grad()
def test_what_is_called_twice_is_left_alone(layers, monkeypatch):
    monkeypatch.setenv("RETENTION_GATES_KERNELS", "fused")
    x = torch.randn(2, 1, 16).half()
    found = watched(layers, x)
    assert [group.layers for group in found.groups] == [[layers[0], layers[1]]]
    plain = step(layers, x)
    with found.replaced():
        for one, other in zip(step(layers, x), plain, strict=True):
            torch.testing.assert_close(one, other)
        here = threading.Thread(target=lambda: results.extend(step(layers, x)))
        results: list[torch.Tensor] = []
        here.start()
        here.join()
        assert all(torch.equal(one, other) for one, other in zip(results, plain, strict=True))


@torch.no_grad()
def test_a_step_that_reads_otherwise_is_refused(layers, monkeypatch):
    monkeypatch.setenv("RETENTION_GATES_KERNELS", "fused")
    found = watched(layers, torch.randn(2, 16).half())
    with found.replaced(), pytest.raises(RuntimeError, match="graph=False"):
        layers[0](torch.randn(2, 16).half())
        layers[1](torch.randn(2, 16).half())
    with found.replaced():  # nothing is left of it
        step(layers, torch.randn(2, 16).half())


def test_many_rows_and_other_classes_are_left_alone(layers, monkeypatch):
    monkeypatch.setenv("RETENTION_GATES_KERNELS", "fused")

    class Quantized(nn.Linear):
        pass

    layers[1] = Quantized(16, 8, dtype=torch.float16)
    assert [group.layers for group in watched(layers, torch.randn(3, 16).half()).groups] == [[layers[0]]]
    assert not watched(layers, torch.randn(MOST_ROWS + 1, 16).half()).groups


def test_the_gates_themselves_say_the_same(device):
    """In 16 bits the gate reads what the base's layers read, and computes in fp32 as before."""
    model = half("llama", device, num_hidden_layers=1)
    gate = find_gated_model(model).gated_layers[0].active_gate
    x = torch.randn(2, 3, model.config.hidden_size, device=device).half()
    assert torch.equal(gate(x), gate(x.float())) and gate(x).dtype == torch.float32


class OnePlus(nn.Module):
    """A norm that weighs by 1 + weight, as Gemma's do."""

    def __init__(self):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.full((16,), 0.5, dtype=torch.float16)), 1e-6

    def forward(self, x):
        return nn.functional.rms_norm(x, [16], 1 + self.weight, self.eps)


@torch.no_grad()
def test_a_norm_of_another_kind_is_left_alone(monkeypatch):
    monkeypatch.setenv("RETENTION_GATES_KERNELS", "fused")
    norms, x, watch = (
        nn.ModuleList([nn.RMSNorm(16, eps=1e-6, dtype=torch.float16), OnePlus()]),
        torch.randn(3, 16).half(),
        Watch(),
    )
    with watch.watching(norms):
        for norm in norms:
            norm(x)
    assert watch.found(norms).norms == [norms[0]]
