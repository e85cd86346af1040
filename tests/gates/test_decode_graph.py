"""Decoding steps give the same recorded and replayed, by a tape on a CPU and by a graph on CUDA."""

import copy
import gc
import re
import weakref

import pytest
import torch
from gated_models import gated_model, token_ids
from peft.tuners.tuners_utils import BaseTunerLayer
from tape import TapeRecorder
from torch import nn

from retention_gates import RetentionGateConfig, find_gated_model
from retention_gates.gates import decode_graph
from retention_gates.gates.cache import BoundedCache
from retention_gates.gates.decode_graph import logger

GREEDY = dict(do_sample=False, max_new_tokens=16)
BEAMS = dict(num_beams=3, num_return_sequences=2)
FAMILIES = ["llama", "qwen3", "qwen3_moe", "qwen3_next", "gemma2", "gemma3_text", "gpt_oss", "cohere2"]
KINDS = ["llama", "gemma3_text", "qwen3_next"]  # of cache layers
three_kinds = pytest.mark.parametrize("family", KINDS)


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request, monkeypatch):
    """Where to run; on a CPU a tape records."""
    monkeypatch.setitem(decode_graph.RECORDERS, "cpu", TapeRecorder)
    return request.param


@pytest.fixture
def recordings(monkeypatch):
    """One entry per recording that is made."""
    made, record = [], decode_graph.DecodeGraph._record
    monkeypatch.setattr(
        decode_graph.DecodeGraph, "_record", lambda self, *given: made.append(self) or record(self, *given)
    )
    return made


def on(device, family="llama", **changes):
    if family == "llama":
        changes = {"num_hidden_layers": 2} | changes
    return gated_model(family, **changes).to(device)


def caches(model, memory_size=8, **options):
    return [BoundedCache(model, memory_size, graph=graph, **options) for graph in (True, False)]


def padded_batch(device):
    """A row of 12 tokens and one of 5 behind padding, and their mask."""
    ids, mask = token_ids(2, 12), torch.ones(2, 12, dtype=torch.long)
    ids[1, :7], mask[1, :7] = 0, 0
    return dict(input_ids=ids.to(device), attention_mask=mask.to(device))


def is_recorded(cache):
    return cache.decode_graph is not None and cache.decode_graph.recording is not None


def assert_same(model, recorded, plain, **arguments):
    """Both caches generate the same and hold the same then; returns it."""
    tokens = model.generate(past_key_values=recorded, **arguments)
    assert is_recorded(recorded) and not is_recorded(plain)
    assert torch.equal(tokens, model.generate(past_key_values=plain, **arguments))
    for ours, theirs in zip(recorded.gated_layers, plain.gated_layers, strict=True):
        assert torch.equal(ours.positions(0), theirs.positions(0)) and torch.equal(ours.seen, theirs.seen)
    assert recorded.get_seq_length() == plain.get_seq_length()
    return tokens


@pytest.mark.parametrize("family", FAMILIES)
def test_padded_batch(device, family, recordings):
    model = on(device, family)
    recorded, plain = caches(model)
    assert_same(model, recorded, plain, **padded_batch(device), **GREEDY)
    assert len(recordings) == 1


@pytest.mark.parametrize("policy", ["key_norm", "random", "streaming_llm", "h2o"])
def test_other_policies(device, policy):
    model = on(device)
    assert_same(model, *caches(model, policy=policy, buffer_size=3), **padded_batch(device), **GREEDY)


def test_500_steps(device, recordings):
    model = on(device, max_position_embeddings=1024)
    ids = token_ids(1, 20).to(device)
    recorded, plain = caches(model, memory_size=24, budgets=[[8, 40], [30, 18]])
    assert_same(model, recorded, plain, input_ids=ids, do_sample=False, max_new_tokens=501)
    assert len(recordings) == 1


@three_kinds
def test_beams(device, family, recordings):
    model = on(device, family)
    if family == "qwen3_next":  # as transformers itself does where it samples
        find_gated_model(model).model.set_experts_implementation("batched_mm")
    assert_same(model, *caches(model), **padded_batch(device), **BEAMS, **GREEDY)
    assert len(recordings) == 1


def test_beams_over_experts_that_wait_are_not_recorded(device, recordings, caplog):
    """Beams keep a prompt's experts: as "eager" does, CUDA's grouped_mm in fp32 asks how many tokens each got."""
    model = on(device, "qwen3_next")
    find_gated_model(model).model.set_experts_implementation("grouped_mm" if device == "cuda" else "eager")
    logger.warning_once.cache_clear()
    with caplog.at_level("WARNING"):
        recorded, plain = (
            model.generate(past_key_values=cache, **padded_batch(device), **BEAMS, **GREEDY) for cache in caches(model)
        )
    assert torch.equal(recorded, plain) and not recordings
    said = [message for message in caplog.messages if "without a CUDA graph" in message]
    assert len(said) == 1 and re.search("waits for the device|_local_scalar_dense|nonzero", said[0])


def test_sampling_and_outputs(device):
    model, found = on(device), []
    ids = token_ids(2, 12).to(device)
    for cache in caches(model):
        torch.manual_seed(0)
        options = dict(do_sample=True, num_return_sequences=2, max_new_tokens=20, return_dict_in_generate=True)
        found.append(model.generate(input_ids=ids, past_key_values=cache, output_logits=True, **options))
    assert torch.equal(found[0].sequences, found[1].sequences)
    for ours, theirs in zip(found[0].logits, found[1].logits, strict=True):
        torch.testing.assert_close(ours, theirs)


@three_kinds
def test_turns_with_one_cache_after_rows_that_ended_early(device, family, recordings):
    """A row that ends early is filled up; the next turn's mask tells with what."""
    model = on(device, family)
    recorded, plain = caches(model, memory_size=10)
    arguments = padded_batch(device)
    alone = model.generate(past_key_values=BoundedCache(model, 10), **arguments, **GREEDY)
    ending = alone[0, 12 + 6].item()
    text = assert_same(model, recorded, plain, **arguments, eos_token_id=ending, pad_token_id=0, **GREEDY)
    made = len(recordings)
    for turn in range(2):
        filled = torch.ones_like(text)
        filled[:, :12] = arguments["attention_mask"]
        if turn == 0:
            filled[0, 19:] = 0
        more = token_ids(2, 1 + 4 * turn, seed=turn).to(device)  # a turn of one token is no step of `generate`
        mask = torch.cat([filled, torch.ones_like(more)], dim=1)
        ids = torch.cat([text, more], dim=1)
        text = assert_same(model, recorded, plain, input_ids=ids, attention_mask=mask, **GREEDY)
        arguments["attention_mask"] = mask[:, :12]
    assert len(recordings) == made


@pytest.mark.parametrize("size", [1, 5])
def test_chunked_prefill(device, size):
    """A chunk of one token is a step in form, but not all of its rows are real."""
    model = on(device)
    assert_same(model, *caches(model), **padded_batch(device), prefill_chunk_size=size, **GREEDY)


@three_kinds
def test_reset_keeps_the_recording(device, family, recordings):
    model = on(device, family)
    recorded, plain = caches(model)
    for _ in range(2):
        assert_same(model, recorded, plain, **padded_batch(device), **GREEDY)
        recorded.reset()
        plain.reset()
    assert len(recordings) == 1


def test_a_copy_records_for_itself(device, recordings):
    model, arguments = on(device), padded_batch(device)
    recorded, plain = caches(model)
    text = assert_same(model, recorded, plain, **arguments, **GREEDY)
    mask = torch.ones(2, text.shape[1] + 3, dtype=torch.long, device=device)
    mask[:, :12] = arguments["attention_mask"]
    ids = torch.cat([text, token_ids(2, 3, seed=5).to(device)], dim=1)
    expected = None
    for cache in (copy.deepcopy(recorded), copy.deepcopy(recorded), recorded):
        assert is_recorded(cache) == (cache is recorded)
        tokens = model.generate(
            input_ids=ids, attention_mask=mask, past_key_values=cache, do_sample=False, max_new_tokens=8
        )
        assert expected is None or torch.equal(tokens, expected)
        expected = tokens
    assert len(recordings) == 3


def test_a_recording_goes_with_its_cache(device):
    model = on(device)
    cache = BoundedCache(model, memory_size=8)
    model.generate(past_key_values=cache, **padded_batch(device), **GREEDY)
    slots = weakref.ref(cache.gated_layers[0].keys)
    gc.collect()
    gc.disable()
    try:
        del cache
        assert slots() is None
    finally:
        gc.enable()


@pytest.mark.parametrize("change", ["repeat", "select", "pin"])
def test_other_slots_or_another_rule(device, change, recordings):
    model, arguments = on(device), padded_batch(device)
    recorded, plain = caches(model)
    text = assert_same(model, recorded, plain, **arguments, **GREEDY)
    for cache in (recorded, plain):
        if change == "repeat":
            cache.batch_repeat_interleave(2)
        elif change == "select":
            cache.batch_select_indices(torch.tensor([1]))
        else:
            cache.pin(0, 1)
    assert not is_recorded(recorded)
    text = {"repeat": text.repeat_interleave(2, dim=0), "select": text[1:], "pin": text}[change]
    ids = torch.cat([text, token_ids(len(text), 3, seed=5).to(device)], dim=1)
    assert_same(model, recorded, plain, input_ids=ids, attention_mask=torch.ones_like(ids), **GREEDY)
    assert len(recordings) == 2


def replace_weights(model):
    layer = model.get_decoder().layers[0].mlp
    layer.up_proj.weight = nn.Parameter(layer.up_proj.weight.flip(0), requires_grad=False)


def swap_data(model):
    weight = model.get_decoder().layers[0].mlp.up_proj.weight
    weight.data = weight.data.flip(0)


def change_in_place(model):
    model.get_decoder().layers[0].mlp.up_proj.weight.data.neg_()


def move_there_and_back(model):
    device, dtype = model.device, model.dtype
    model.to("cpu").double()
    model.to(device, dtype)


@pytest.mark.parametrize("change", [replace_weights, swap_data, change_in_place, move_there_and_back])
def test_other_weights(device, change):
    model = on(device)
    recorded, plain = caches(model)
    before = assert_same(model, recorded, plain, **padded_batch(device), **GREEDY)
    change(find_gated_model(model).model)
    recorded.reset()
    plain.reset()
    after = assert_same(model, recorded, plain, **padded_batch(device), **GREEDY)
    assert torch.equal(before, after) == (change is move_there_and_back)


def test_an_adapter_of_the_base_switched_off(device):
    """Its weights stay where they are; only what Python does with them changes."""
    model = on(device)

    class Scaled(nn.Module, BaseTunerLayer):
        adapter_layer_names = ("scale",)

        def __init__(self, base_layer):
            super().__init__()
            self.base_layer, self.scale = base_layer, nn.ParameterDict({"a": torch.tensor(1.5)})
            self._active_adapter, self._disable_adapters, self.merged_adapters = ["a"], False, []

        def forward(self, x):
            return self.base_layer(x) if self.disable_adapters else self.base_layer(x) * self.scale["a"]

    mlp = find_gated_model(model).model.get_decoder().layers[0].mlp
    mlp.up_proj = Scaled(mlp.up_proj).to(device)
    recorded, plain = caches(model)
    before = assert_same(model, recorded, plain, **padded_batch(device), **GREEDY)
    mlp.up_proj._disable_adapters = True
    recorded.reset()
    plain.reset()
    assert not torch.equal(assert_same(model, recorded, plain, **padded_batch(device), **GREEDY), before)


def test_another_adapter_or_model(device):
    model, other = on(device), on(device)
    cache = BoundedCache(model, memory_size=8)
    model.generate(past_key_values=cache, **padded_batch(device), **GREEDY)
    cache.reset()
    with pytest.raises(ValueError, match="another model"):
        other.generate(past_key_values=cache, **padded_batch(device), **GREEDY)
    with pytest.raises(ValueError, match="gates are off"), model.disable_adapter():
        model.generate(past_key_values=cache, **padded_batch(device), **GREEDY)
    cache.reset()
    model.add_adapter("second", RetentionGateConfig(gate_width=16))
    model.set_adapter("second")
    with pytest.raises(ValueError, match="adapter 'default' and another is active"):
        model.generate(past_key_values=cache, **padded_batch(device), **GREEDY)


def waiting(module):
    forward = module.forward

    def ask_first(x):
        return forward(x) if x.isfinite().all() else x

    module.forward = ask_first


@pytest.mark.parametrize(
    ("case", "reason"),
    [
        ("hook", "mlp.up_proj has a forward hook"),
        ("lagkv", "policy='lagkv' waits for the device"),
        ("expected_attention", "gives priorities at every 8th step only"),
        ("waits", "waits for the device|_local_scalar_dense"),
    ],
)
def test_what_cannot_be_recorded_runs_as_it_is_and_that_is_said(device, case, reason, caplog):
    model = on(device)
    options = {} if case in ("hook", "waits") else dict(policy=case, memory_size=20)
    mlp = find_gated_model(model).model.get_decoder().layers[0].mlp
    calls = []
    if case == "hook":
        mlp.up_proj.register_forward_hook(lambda *_: calls.append(1))
    elif case == "waits":
        waiting(mlp.up_proj)
    logger.warning_once.cache_clear()
    recorded, plain = caches(model, **options)
    with caplog.at_level("WARNING"):
        for cache in (recorded, plain):
            model.generate(past_key_values=cache, **padded_batch(device), **GREEDY)
    assert not is_recorded(recorded)
    said = [message for message in caplog.messages if "without a CUDA graph" in message]
    assert len(said) == 1 and re.search(reason, said[0]) and "graph=False" in said[0]
    assert len(calls) == (32 if case == "hook" else 0)


def test_hidden_states_are_of_plain_steps(device, recordings):
    model, found = on(device), []
    options = dict(output_hidden_states=True, return_dict_in_generate=True)
    for cache in caches(model):
        found.append(model.generate(past_key_values=cache, **padded_batch(device), **options, **GREEDY).hidden_states)
    assert not recordings
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


class EveryStep:
    """A Recorder that never replays, so that every step goes through what was compiled."""

    def __init__(self, device):
        pass

    def warm_up(self, step):
        return step(), None


def test_one_compilation_for_all_lengths_and_caches(monkeypatch):
    monkeypatch.setitem(decode_graph.RECORDERS, "cpu", EveryStep)
    monkeypatch.setattr(decode_graph.DecodeGraph, "_record", lambda self, f, key, *given: self._run(f, *merged(given)))
    monkeypatch.setenv("RETENTION_GATES_KERNELS", "fused")  # operators, as on CUDA: nothing inside is compiled
    compiled, compile = [], torch.compile

    def backend(graph, inputs):
        compiled.append(graph)
        return graph.forward

    monkeypatch.setattr(torch, "compile", lambda forward, **options: compile(forward, backend=backend, **options))
    model, ids = on("cpu", num_hidden_layers=1), token_ids(1, 6)
    plain = model.generate(input_ids=ids, past_key_values=BoundedCache(model, 4), do_sample=False, max_new_tokens=7)
    for _ in range(2):
        cache = BoundedCache(model, 4, compile=True)
        for _ in range(2):
            tokens = model.generate(input_ids=ids, past_key_values=cache, do_sample=False, max_new_tokens=7)
            assert torch.equal(tokens, plain)
            cache.reset()
    assert len(compiled) == 1


def merged(given):
    tensors, others = given
    return [tensors | others]


@pytest.mark.slow  # inductor builds C++
def test_compiled_for_the_processor(monkeypatch):
    monkeypatch.setitem(decode_graph.RECORDERS, "cpu", EveryStep)
    monkeypatch.setattr(decode_graph.DecodeGraph, "_record", lambda self, f, key, *given: self._run(f, *merged(given)))
    monkeypatch.setenv("RETENTION_GATES_KERNELS", "fused")
    model, ids = on("cpu", num_hidden_layers=1), token_ids(1, 6)
    options = dict(do_sample=False, max_new_tokens=7)
    plain = model.generate(input_ids=ids, past_key_values=BoundedCache(model, 4, graph=False), **options)
    compiled = model.generate(input_ids=ids, past_key_values=BoundedCache(model, 4, compile=True), **options)
    assert torch.equal(compiled, plain)


@pytest.mark.gpu
def test_compiled_and_recorded():
    model = on("cuda", "qwen3")
    recorded, plain = BoundedCache(model, 8, compile=True), BoundedCache(model, 8, graph=False)
    assert_same(model, recorded, plain, **padded_batch("cuda"), **GREEDY)


def test_options_must_be_bools():
    model = gated_model()
    with pytest.raises(ValueError, match="graph='yes'"):
        BoundedCache(model, 8, graph="yes")
    with pytest.raises(ValueError, match="it needs graph=True"):
        BoundedCache(model, 8, graph=False, compile=True)


@three_kinds
def test_replays_are_counted_and_what_they_leave_can_be_saved(device, recordings, tmp_path, family):
    model = on(device, family)
    recorded, plain = caches(model)
    ids = token_ids(1, 9).to(device)
    for cache in (recorded, plain):
        model.generate(input_ids=ids, past_key_values=cache, **GREEDY)
        assert {layer.columns for layer in cache.gated_layers} == {int(cache.get_seq_length())} == {9 + 15}
    assert recordings
    recorded.save(tmp_path / "memory")
    loaded = BoundedCache.load(model, tmp_path / "memory")
    seen = torch.ones(1, 24 + 9, dtype=torch.long, device=device)
    one, other = (
        model.generate(input_ids=ids, attention_mask=seen, past_key_values=cache, **GREEDY)
        for cache in (loaded, plain)
    )
    assert torch.equal(one, other)


def test_a_replay_that_cannot_be_counted_is_refused(device, recordings):
    model = on(device)
    cache = caches(model)[0]
    model.generate(input_ids=token_ids(1, 9).to(device), past_key_values=cache, **GREEDY)
    for layer in cache.gated_layers:
        layer.columns = 2**24 - 20
    with pytest.raises(ValueError, match="would pass 16777216"):
        seen = torch.ones(1, 24 + 9, dtype=torch.long, device=device)
        model.generate(input_ids=token_ids(1, 9).to(device), attention_mask=seen, past_key_values=cache, **GREEDY)
    assert {layer.columns for layer in cache.gated_layers} == {2**24}


def test_global_budgets_are_not_recorded(device, recordings):
    model = on(device)
    cache = caches(model, budgets="global")[0]
    model.generate(input_ids=token_ids(1, 9).to(device), past_key_values=cache, **GREEDY)
    assert not recordings
