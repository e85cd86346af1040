"""Steps that are not captured, or compiled first."""

import re
from dataclasses import replace

import pytest
import torch
from captured import GREEDY, assert_same, caches, is_captured, on, padded_batch
from gated_models import gated_model, token_ids

from retention_gates import find_gated_model
from retention_gates.gates.cache import BoundedCache
from retention_gates.gates.decode.step import logger
from retention_gates.gates.policies import POLICIES


def waiting(module):
    forward = module.forward

    def ask_first(x):
        return forward(x) if x.isfinite().all() else x

    module.forward = ask_first


@pytest.mark.parametrize(
    ("case", "reason"),
    [
        ("hook", "mlp.up_proj has a forward hook"),
        ("h2o", "policy='h2o' waits for the device"),
        ("waits", "waits for the device|_local_scalar_dense"),
    ],
)
def test_what_cannot_be_captured_runs_as_it_is_and_that_is_said(device, case, reason, caplog):
    model = on(device)
    reads_back = replace(POLICIES["h2o"], reads_back=True)
    options = dict(policy=reads_back, memory_size=20) if case == "h2o" else {}
    mlp = find_gated_model(model).model.get_decoder().layers[0].mlp
    calls = []
    if case == "hook":
        mlp.up_proj.register_forward_hook(lambda *_: calls.append(1))
    elif case == "waits":
        waiting(mlp.up_proj)
    logger.warning_once.cache_clear()
    captured, plain = caches(model, **options)
    with caplog.at_level("WARNING"):
        for cache in (captured, plain):
            model.generate(past_key_values=cache, **padded_batch(device), **GREEDY)
    assert not is_captured(captured)
    said = [message for message in caplog.messages if "without a CUDA graph" in message]
    assert len(said) == 1 and re.search(reason, said[0]) and "graph=False" in said[0]
    assert len(calls) == (32 if case == "hook" else 0)


def test_hidden_states_are_of_plain_steps(device, captures):
    model, found = on(device), []
    options = dict(output_hidden_states=True, return_dict_in_generate=True)
    for cache in caches(model):
        found += [model.generate(past_key_values=cache, **padded_batch(device), **options, **GREEDY).hidden_states]
    assert not captures
    assert torch.equal(found[0][-1][-1], found[1][-1][-1])
    # transformers' own hooks are in the model from now on, and do nothing
    assert_same(model, *caches(model), **padded_batch(device), **GREEDY)


def test_the_models_forward_is_its_own_again(device):
    model = on(device)
    inner = find_gated_model(model).model
    own = inner.forward
    with pytest.raises(ValueError, match="batch of 2"):
        cache = BoundedCache(model, memory_size=8)
        model.generate(past_key_values=cache, **padded_batch(device), **GREEDY)
        model.generate(input_ids=token_ids(1, 80).to(device), past_key_values=cache, **GREEDY)
    assert "forward" not in vars(inner) and inner.forward == own


@pytest.fixture
def compiled(monkeypatch):
    """One entry per graph that is traced, whole steps only; what is traced runs as it is."""
    torch._dynamo.reset()  # it counts what all tests before had compiled
    traced, compile = [], torch.compile

    def backend(graph, inputs):
        traced.append(graph)
        return graph.forward

    def compile_all(forward, **options):
        return compile(forward, backend=backend, fullgraph=True, **options)

    monkeypatch.setattr(torch, "compile", compile_all)
    return traced


# operators, as on CUDA: nothing inside is compiled; or what they do, as on a CPU
@pytest.mark.parametrize("kernels", ["fused", None])
def test_one_compilation_for_all_lengths_and_caches(monkeypatch, compiled, kernels):
    if kernels is not None:
        monkeypatch.setenv("RETENTION_GATES_KERNELS", kernels)
    model, ids = on("cpu", num_hidden_layers=1), token_ids(1, 6)
    plain = model.generate(input_ids=ids, past_key_values=BoundedCache(model, 4), do_sample=False, max_new_tokens=7)
    for _ in range(2):
        cache = BoundedCache(model, 4, compile=True)
        for _ in range(2):
            tokens = model.generate(input_ids=ids, past_key_values=cache, do_sample=False, max_new_tokens=7)
            assert torch.equal(tokens, plain)
            cache.reset()
    assert len(compiled) == 1


@pytest.mark.parametrize(
    ("family", "options"),
    [
        ("llama", dict(memory_size=9, buffer_size=3)),
        ("llama", dict(budgets=[[6, 12], [13, 5]])),
        ("llama", dict(policy="h2o")),
        ("llama", dict(policy="streaming_llm", cache_dtype="int8")),
        ("gemma3_text", {}),
        ("qwen3_next", {}),
    ],
)
def test_compiled_on_a_cpu(compiled, family, options):
    model = on("cpu", family)
    sizes = {"memory_size": 9} | options
    each_step, plain = BoundedCache(model, compile=True, **sizes), BoundedCache(model, graph=False, **sizes)
    for _ in range(2):
        tokens = [model.generate(past_key_values=c, **padded_batch("cpu"), **GREEDY) for c in (each_step, plain)]
        assert torch.equal(*tokens) and each_step.get_seq_length() == plain.get_seq_length()
        for ours, theirs in zip(each_step.gated_layers, plain.gated_layers, strict=True):
            assert torch.equal(ours.positions(0), theirs.positions(0)) and torch.equal(ours.seen, theirs.seen)
        each_step.reset(), plain.reset()
    assert len(compiled) == 1
    assert each_step.decode_step.refusal is None


def test_what_is_not_compiled_is_said(compiled, caplog):
    model = on("cpu")
    options = dict(memory_size=20, policy=replace(POLICIES["h2o"], reads_back=True))
    cache, plain = BoundedCache(model, compile=True, **options), BoundedCache(model, **options)
    logger.warning_once.cache_clear()
    with caplog.at_level("WARNING"):
        tokens = [model.generate(past_key_values=c, **padded_batch("cpu"), **GREEDY) for c in (cache, plain)]
    assert torch.equal(*tokens) and not compiled
    said = [message for message in caplog.messages if message.startswith("Decoding without")]
    assert len(said) == 1 and "without torch.compile" in said[0] and "compile=False" in said[0]


def test_what_cannot_be_built_is_said_before_anything_is_read(monkeypatch):
    monkeypatch.setenv("PATH", "")
    monkeypatch.setenv("CXX", "no-such-compiler")
    model = on("cpu")
    cache = BoundedCache(model, 8, compile=True)
    with pytest.raises(ValueError, match=r"none of no-such-compiler, g\+\+, clang\+\+ is installed"):
        model.generate(past_key_values=cache, **padded_batch("cpu"), **GREEDY)
    assert cache.get_seq_length() == 0


@pytest.mark.slow  # inductor builds C++
@pytest.mark.parametrize("kernels", ["fused", None])
def test_compiled_for_the_processor(monkeypatch, kernels):
    if kernels is not None:
        monkeypatch.setenv("RETENTION_GATES_KERNELS", kernels)
    model, ids = on("cpu", num_hidden_layers=1), token_ids(1, 6)
    options = dict(do_sample=False, max_new_tokens=7)
    plain = model.generate(input_ids=ids, past_key_values=BoundedCache(model, 4, graph=False), **options)
    compiled = model.generate(input_ids=ids, past_key_values=BoundedCache(model, 4, compile=True), **options)
    assert torch.equal(compiled, plain)


@pytest.mark.gpu
def test_compiled_and_captured():
    model = on("cuda", "qwen3")
    captured, plain = BoundedCache(model, 8, compile=True), BoundedCache(model, 8, graph=False)
    assert_same(model, captured, plain, **padded_batch("cuda"), **GREEDY)


def test_options_must_be_bools():
    model = gated_model()
    with pytest.raises(ValueError, match="graph='yes'"):
        BoundedCache(model, 8, graph="yes")
    with pytest.raises(ValueError, match="it needs graph=True"):
        BoundedCache(model, 8, graph=False, compile=True)
