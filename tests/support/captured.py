"""Decoding with and without a capture, by a tape on a CPU and by a graph on CUDA."""

import pytest
import torch
from gated_models import gated_model, token_ids

from retention_gates import BoundedCache

GREEDY = dict(do_sample=False, max_new_tokens=16)
KINDS = ["llama", "gemma3_text", "qwen3_next"]  # of cache layers
three_kinds = pytest.mark.parametrize("family", KINDS)


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


def is_captured(cache):
    return cache.decode_step is not None and bool(cache.decode_step.captures)


def assert_same(model, captured, plain, **arguments):
    """Both caches generate the same and hold the same then; returns it."""
    tokens = model.generate(past_key_values=captured, **arguments)
    assert is_captured(captured) and not is_captured(plain)
    assert torch.equal(tokens, model.generate(past_key_values=plain, **arguments))
    for ours, theirs in zip(captured.gated_layers, plain.gated_layers, strict=True):
        assert torch.equal(ours.positions(0), theirs.positions(0)) and torch.equal(ours.seen, theirs.seen)
    assert captured.get_seq_length() == plain.get_seq_length()
    return tokens
