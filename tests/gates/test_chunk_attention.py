"""Chunks over ragged slots: all ways give softmax attention, and a longer prompt takes no more memory."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from gated_models import gated_model, token_ids
from torch.utils._python_dispatch import TorchDispatchMode

from retention_gates.gates import chunk_attention
from retention_gates.gates.cache import BoundedCache
from retention_gates.gates.chunk_attention import attend_in_blocks, attend_without_mask, even_counts

SUPPORT = Path(__file__).resolve().parents[1] / "support"


def case(offsets, counts, tokens, group, batch=2, seed=0):
    """Slots of which each head holds so many of, in places of their own in every row; positions of the chunk."""
    generator = torch.Generator().manual_seed(seed)
    heads, slots = len(counts), offsets[-1]
    positions = torch.full((batch, slots), -1)
    for row in range(batch):
        for head, count in enumerate(counts):
            places = torch.randperm(offsets[head + 1] - offsets[head], generator=generator)[:count] + offsets[head]
            positions[row, places] = torch.randperm(100, generator=generator)[:count]

    def randn(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    held = randn(batch, slots, 8), randn(batch, slots, 6), positions
    chunk = randn(batch, heads, tokens, 8), randn(batch, heads, tokens, 6), torch.arange(100, 100 + tokens)[None]
    return randn(batch, heads * group, tokens, 8), held, (*chunk[:2], chunk[2].expand(batch, -1))


def by_hand(query, slots, chunk, offsets, scale):
    """The equation, one query at a time."""
    output = torch.zeros(*query.shape[:3], slots[1].shape[2], dtype=query.dtype)
    group = query.shape[1] // chunk[0].shape[1]
    for row in range(len(query)):
        for head in range(query.shape[1]):
            own = head // group
            places = range(offsets[own], offsets[own + 1])
            held = [place for place in places if slots[2][row, place] >= 0]
            for step in range(query.shape[2]):
                new = [i for i in range(step + 1) if chunk[2][row, i] >= 0]
                keys = torch.cat([slots[0][row, held], chunk[0][row, own, new]])
                values = torch.cat([slots[1][row, held], chunk[1][row, own, new]])
                if len(keys):
                    output[row, head, step] = (keys @ query[row, head, step] * scale).softmax(0) @ values
    return output


@pytest.mark.parametrize(
    ("offsets", "counts", "tokens", "group"),
    [
        ((0, 5, 12), (5, 7), 7, 1),
        ((0, 5, 12, 16), (4, 4, 4), 10, 2),
        ((0, 5, 12, 17), (3, 3, 5), 9, 2),
        ((0, 4, 9, 13), (2, 5, 2), 2, 3),
        ((0, 4, 8), (3, 3), 1, 3),
        ((0, 4, 8), (0, 1), 4, 4),
    ],
)
def test_all_ways_are_softmax_attention(offsets, counts, tokens, group, monkeypatch):
    monkeypatch.setattr(chunk_attention, "QUERIES", 3)
    query, slots, chunk = case(offsets, counts, tokens, group)
    expected = by_hand(query, slots, chunk, offsets, 0.4)
    for together in (False, True):
        found = attend_in_blocks(query, slots, chunk, offsets, scale=0.4, together=together)
        torch.testing.assert_close(found, expected)
    assert even_counts(slots[2], offsets) == list(counts)
    if len(set(counts)) == 1:
        found = attend_without_mask(query, slots, chunk, offsets, counts[0], scale=0.4)
        torch.testing.assert_close(found, expected)


def test_rows_that_hold_differently_and_padding(monkeypatch):
    monkeypatch.setattr(chunk_attention, "QUERIES", 4)
    offsets = (0, 5, 12)
    query, slots, chunk = case(offsets, (4, 6), 9, 2)
    slots[2][1, :3] = -1
    padded = (*chunk[:2], chunk[2].clone())
    padded[2][0, :2] = -1
    padded[2][1, 4:6] = -1
    assert even_counts(slots[2], offsets) is None
    expected = by_hand(query, slots, padded, offsets, 0.4)
    nobody = (*slots[:2], torch.full_like(slots[2], -1))
    alone = by_hand(query, nobody, padded, offsets, 0.4)
    sinks = torch.full((4,), -1e4, dtype=torch.float64)  # which changes nothing, by the way of softcaps and sinks
    for options in ({"together": False}, {"together": True}, {"together": True, "sinks": sinks}):
        found = attend_in_blocks(query, slots, padded, offsets, scale=0.4, **options)
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
        found = attend_in_blocks(query, None, padded, offsets, scale=0.4, **options)
        torch.testing.assert_close(found, alone, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("budgets", ["uniform", [[9, 15], [12, 12], [20, 4], [5, 19]]])
def test_a_cache_reads_the_same_either_way(budgets, monkeypatch):
    model, ids, logits = gated_model(), token_ids(2, 70), []
    for on_cuda in (False, True):
        cache = BoundedCache(model, memory_size=12, budgets=budgets)
        if on_cuda:  # what CUDA takes, on this device
            monkeypatch.setattr("retention_gates.gates.slot_layer.attend_in_blocks", as_on_cuda)
        with torch.no_grad():
            parts = [model(input_ids=part, past_key_values=cache).logits for part in ids.split([20, 30, 1, 19], 1)]
        logits.append(torch.cat(parts, dim=1))
    torch.testing.assert_close(logits[1], logits[0], rtol=1e-4, atol=1e-4)


def as_on_cuda(query, slots, chunk, offsets, *, scale, softcap, sinks, together):
    counts = even_counts(slots[2], offsets)
    assert counts is not None and softcap is None and sinks is None and not together
    if len(set(counts)) == 1:
        return attend_without_mask(query, slots, chunk, offsets, counts[0], scale=scale)
    return attend_in_blocks(query, slots, chunk, offsets, scale=scale, together=True)


class Largest(TorchDispatchMode):
    """The bytes of the largest tensor that any operation makes."""

    bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else (result,):
            if isinstance(tensor, torch.Tensor):
                self.bytes = max(self.bytes, tensor.untyped_storage().nbytes())
        return result


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_no_tensor_grows_with_the_prompt(family):
    model = gated_model(family)
    largest = []
    for tokens in (512, 2048):
        cache = BoundedCache(model, memory_size=32)
        with Largest() as mode:
            model.generate(
                input_ids=token_ids(1, tokens), past_key_values=cache, prefill_chunk_size=256, max_new_tokens=2
            )
        largest.append(mode.bytes)
        assert cache.get_seq_length() == tokens + 1
    assert largest[1] == largest[0] > 8 * 2048  # the ids and the mask of the prompt are smaller


MEASURED = """
import resource, sys, torch
sys.path.insert(0, sys.argv[1])
torch.set_num_threads(1)
from gated_models import gated_model, token_ids
from retention_gates.gates.cache import BoundedCache
model = gated_model(num_hidden_layers=2)
for tokens in (40_000, 131_072):
    cache = BoundedCache(model, memory_size=64)
    model.generate(input_ids=token_ids(1, tokens), past_key_values=cache, max_new_tokens=2)
    assert cache.get_seq_length() == tokens + 1
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, flush=True)
"""


@pytest.mark.slow
def test_memory_is_flat_at_131072_tokens():
    """Peak resident memory of a process, by default chunks: what is added is the prompt itself."""
    ran = subprocess.run([sys.executable, "-c", MEASURED, str(SUPPORT)], capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    short, long = (int(line) / 1024 for line in ran.stdout.split())  # MiB
    of_prompt = (131_072 - 40_000) * 8 * 4 / 2**20  # ids, mask, positions and a copy: int64 each
    print(f"peak {short:.1f} MiB after 40,000 tokens, {long:.1f} MiB after 131,072")
    assert long - short < of_prompt + 24  # pages that the allocator keeps
