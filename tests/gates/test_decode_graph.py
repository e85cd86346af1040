"""Decoding steps that are recorded and replayed give what they give without: by a tape on a CPU, by a graph on CUDA."""

import copy

import pytest
import torch
from gated_models import gated_model, token_ids
from tape import TapeRecorder

from retention_gates import find_gated_model
from retention_gates.gates import decode_graph
from retention_gates.gates.cache import BoundedCache

GREEDY = dict(do_sample=False, max_new_tokens=40)
FAMILIES = ["llama", "qwen3", "qwen3_moe", "qwen3_next"]


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request, monkeypatch):
    """Where to run; on a CPU a tape records."""
    monkeypatch.setitem(decode_graph.RECORDERS, "cpu", TapeRecorder)
    monkeypatch.setattr(TapeRecorder, "recordings", 0)
    monkeypatch.setattr(TapeRecorder, "replays", 0)
    return request.param


def on(device, family="llama", **changes):
    return gated_model(family, **changes).to(device)


def is_replayed(cache):
    return cache.decode_graph is not None and cache.decode_graph.recording is not None


@pytest.mark.parametrize("family", FAMILIES)
def test_same_tokens(device, family):
    model, ids = on(device, family), token_ids(2, 12).to(device)
    cache = BoundedCache(model, memory_size=8)
    tokens = model.generate(input_ids=ids, past_key_values=cache, **GREEDY)
    plain = BoundedCache(model, memory_size=8, graph=False)
    assert torch.equal(tokens, model.generate(input_ids=ids, past_key_values=plain, **GREEDY))
    assert is_replayed(cache) and not is_replayed(plain)
    for ours, theirs in zip(cache.gated_layers, plain.gated_layers, strict=True):
        assert torch.equal(ours.positions(0), theirs.positions(0)) and torch.equal(ours.seen, theirs.seen)
