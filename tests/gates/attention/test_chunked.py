"""Chunks over ragged slots: all ways give softmax attention, and a longer prompt takes no more memory."""

import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from gated_models import gated_model, token_ids
from torch.utils._python_dispatch import TorchDispatchMode

from retention_gates.gates.attention import chunked
from retention_gates.gates.attention.chunked import attend_chunk, attend_in_blocks, attend_packed
from retention_gates.gates.cache import BoundedCache
from retention_gates.kernels.softmax import Softmax

SUPPORT = Path(__file__).resolve().parents[2] / "support"


def case(offsets, counts, tokens, group, batch=2, seed=0, dims=(8, 6)):
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

    held = *(randn(batch, slots, dim) for dim in dims), positions
    chunk = *(randn(batch, heads, tokens, dim) for dim in dims), torch.arange(100, 100 + tokens).expand(batch, -1)
    return randn(batch, heads * group, tokens, dims[0]), held, chunk


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


def flash_by_hand(query, key, value, ends_q, ends_k, most_q, most_k, dropout, causal, mask, *, scale):
    """What CUDA's operator gives: a causal mask from the lower right in each sequence."""
    assert causal and not dropout and not mask and ends_q.dtype == ends_k.dtype == torch.int32
    output = torch.full((*query.shape[:2], value.shape[2]), float("nan"), dtype=query.dtype)
    for (begin, end), (first, stop) in zip(pairwise(ends_q.tolist()), pairwise(ends_k.tolist()), strict=True):
        assert end - begin <= most_q and stop - first <= most_k and stop <= len(key)
        logits = torch.einsum("thd,sud->hts", query[begin:end], key[first:stop]) * scale  # one KV head
        mask = torch.ones(logits.shape[1:], dtype=torch.bool).tril(stop - first - (end - begin))
        weights = logits.masked_fill(~mask, float("-inf")).softmax(2)
        output[begin:end] = torch.einsum("hts,sud->thd", weights, value[first:stop])
    return (output,)


@pytest.fixture
def as_on_cuda(monkeypatch):
    """What CUDA takes for 16 bits, on a CPU."""
    calls = []
    monkeypatch.setattr(chunked, "_flash_takes", lambda *tensors: True)
    monkeypatch.setattr(
        chunked,
        "flash_attention",
        lambda *given, **options: calls.append(1) or flash_by_hand(*given, **options),
    )
    return calls


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
def test_all_ways_are_softmax_attention(offsets, counts, tokens, group, monkeypatch, as_on_cuda):
    monkeypatch.setattr(chunked, "QUERIES", 3)
    query, slots, chunk = case(offsets, counts, tokens, group, dims=(8, 8))
    slots[2][1, : offsets[1]] = -1  # rows may hold differently
    for tensor in slots[:2]:
        tensor[slots[2] < 0] = 1e9  # of an evicted entry
    expected = by_hand(query, slots, chunk, offsets, 0.4)
    for together in (False, True):
        found = attend_in_blocks(query, slots, chunk, offsets, Softmax(0.4), together=together)
        torch.testing.assert_close(found, expected)
    torch.testing.assert_close(attend_packed(query, slots, chunk, offsets, 0.4), expected)
    assert as_on_cuda


@pytest.mark.gpu
@pytest.mark.parametrize(("dim", "tokens", "group"), [(128, 200, 4), (64, 129, 1), (8, 17, 3)])
def test_flash_attention_of_sequences(dim, tokens, group, monkeypatch):
    """The operator of CUDA, which no CPU has, in 16 bits against fp64."""
    monkeypatch.setattr(chunked, "attend_in_blocks", None)
    offsets = (0, 40, 340, 475)
    query, slots, chunk = case(offsets, (39, 90, 0), tokens, group, dims=(dim, dim))
    slots[2][1, :50] = -1
    rounded = [[x.bfloat16() if x.is_floating_point() else x for x in part] for part in ([query], slots, chunk)]
    query, slots, chunk = ([x.double() if x.is_floating_point() else x for x in part] for part in rounded)
    expected = by_hand(*query, slots, chunk, offsets, dim**-0.5)
    (query,), slots, chunk = ([x.cuda() for x in part] for part in rounded)
    found = attend_chunk(query, slots, chunk, offsets, Softmax(dim**-0.5), is_padded=False)
    torch.testing.assert_close(found.cpu().double(), expected, rtol=0.02, atol=0.02)


def test_rows_that_hold_differently_and_padding(monkeypatch):
    monkeypatch.setattr(chunked, "QUERIES", 4)
    offsets = (0, 5, 12)
    query, slots, chunk = case(offsets, (4, 6), 9, 2)
    slots[2][1, :3] = -1
    padded = (*chunk[:2], chunk[2].clone())
    padded[2][0, :2] = -1
    padded[2][1, 4:6] = -1
    expected = by_hand(query, slots, padded, offsets, 0.4)
    nobody = (*slots[:2], torch.full_like(slots[2], -1))
    alone = by_hand(query, nobody, padded, offsets, 0.4)
    sinks = torch.full((4,), -1e4, dtype=torch.float64)  # which changes nothing, by the way of softcaps and sinks
    for together, extra in ((False, None), (True, None), (True, sinks)):
        options = dict(softmax=Softmax(0.4, None, extra), together=together)
        found = attend_in_blocks(query, slots, padded, offsets, **options)
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
        found = attend_in_blocks(query, None, padded, offsets, **options)
        torch.testing.assert_close(found, alone, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("budgets", ["uniform", [[9, 15], [12, 12], [20, 4], [5, 19]]])
def test_a_cache_reads_the_same_either_way(budgets, request):
    model, ids, logits = gated_model(), token_ids(2, 70), []
    mask = torch.ones(2, 70, dtype=torch.long)
    mask[1, :7] = 0  # so that rows hold differently, and the first chunk takes the other way
    for on_cuda in (False, True):
        calls = request.getfixturevalue("as_on_cuda") if on_cuda else []
        cache, parts, seen = BoundedCache(model, memory_size=12, budgets=budgets), [], 0
        with torch.no_grad():
            for part in ids.split([20, 30, 1, 19], dim=1):
                seen += part.shape[1]
                output = model(input_ids=part, attention_mask=mask[:, :seen], past_key_values=cache)
                parts.append(output.logits)
        logits.append(torch.cat(parts, dim=1))
        assert len(calls) == (2 * len(cache.gated_layers) if on_cuda else 0)
    torch.testing.assert_close(logits[1][0], logits[0][0], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(logits[1][1, 7:], logits[0][1, 7:], rtol=1e-4, atol=1e-4)


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
