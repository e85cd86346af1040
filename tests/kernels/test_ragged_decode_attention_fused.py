"""ragged_decode_attention's kernels against fp64, no further off than plain torch in the same dtype."""

import os
from itertools import accumulate, pairwise
from unittest import mock

import pytest
import torch
import torch.nn.functional as F

from retention_gates.kernels.dispatch import VARIABLE
from retention_gates.kernels.ragged_decode_attention import Run, fused, naive, parts, ragged_decode_attention
from retention_gates.kernels.ragged_decode_attention.parts import parts_of
from retention_gates.kernels.softmax import Softmax

interpreted = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="needs Triton's interpreter")
DEVICES = [pytest.param("cpu", marks=interpreted), pytest.param("cuda", marks=pytest.mark.gpu)]


def inputs(sizes, group, head_dim, value_dim, batch=2, tokens=1, dtype=torch.float32, device="cpu", seed=0):
    """Keys of empty slots are NaN; the first head of the first row holds nothing."""
    generator = torch.Generator().manual_seed(seed)
    heads, offsets = len(sizes), tuple(accumulate(sizes, initial=0))

    def normal(*shape):
        return torch.randn(*shape, generator=generator).to(dtype).to(device)

    positions = torch.randint(-1, 3, (batch, offsets[-1]), generator=generator).to(device)
    positions[0, : sizes[0]] = -1
    keys = normal(batch, offsets[-1], head_dim)
    keys[positions < 0] = float("nan")
    # as transformers hands them over: tokens before heads in memory
    query = normal(batch, tokens, heads * group, head_dim).transpose(1, 2)
    case = (query, keys, normal(batch, offsets[-1], value_dim), positions, offsets)
    columns = torch.arange(tokens, device=device).expand(batch, -1).clone()
    columns[0, : tokens // 2] = -1
    key, value = (normal(batch, tokens, heads, width).transpose(1, 2) for width in (head_dim, value_dim))
    return case, Run(key, value, columns), normal(heads * group)


def exact(case, run, softmax):
    """The equation in fp64, written with loops over rows and query heads; [B, HQ, n, Dv], and what slots received."""
    query, keys, values, positions, offsets = case
    scale, softcap, sinks = softmax
    batch, query_heads, tokens, _ = query.shape
    group = query_heads // (len(offsets) - 1)
    output = torch.zeros(batch, query_heads, tokens, values.shape[2], dtype=torch.float64, device=query.device)
    received = torch.zeros(positions.shape, dtype=torch.float64, device=query.device)
    for row in range(batch):
        for query_head in range(query_heads):
            head = query_head // group
            own = torch.arange(offsets[head], offsets[head + 1], device=query.device)
            own = own[positions[row, own] >= 0]
            key, value = keys[row, own].double(), values[row, own].double()
            for token in range(tokens):
                if run is not None:
                    real = run.positions[row, : token + 1] >= 0
                    key = torch.cat([keys[row, own], run.key[row, head, : token + 1][real]]).double()
                    value = torch.cat([values[row, own], run.value[row, head, : token + 1][real]]).double()
                logits = key @ query[row, query_head, token].double() * scale
                if softcap is not None:
                    logits = softcap * torch.tanh(logits / softcap)
                if sinks is not None:
                    logits = torch.cat([logits, sinks[query_head, None].double()])
                weights = logits.softmax(0)[: len(key)] if len(logits) else logits
                output[row, query_head, token] = weights @ value
                if run is None:
                    received[row, own] += weights
    return output, received


def check(sizes, group, dims, *, tokens=1, dtype, device, softcap=None, with_sinks=False, batch=2, **more):
    case, run, sinks = inputs(sizes, group, *dims, batch, tokens, dtype, device)
    run = run if tokens > 1 else None
    softmax = Softmax(dims[0] ** -0.5, softcap, sinks if with_sinks else None)
    received = torch.full_like(case[3], float("nan"), dtype=torch.float32) if tokens == 1 else None
    with mock.patch.object(torch.Tensor, "new_empty", _filled_with_nan):
        output = fused.ragged_decode_attention(*case, softmax, run=run, received=received)
    assert output.dtype == dtype and output.transpose(1, 2).is_contiguous()
    expected, expected_received = exact(case, run, softmax)
    theirs = _same_dtype(case, run, softmax)
    error, allowed = (output - expected).abs().max(), (theirs - expected).abs().max()
    assert error <= 2 * allowed + 1e-6, (error, allowed)
    if run is None:
        assert (output[0, :group] == 0).all()
        torch.testing.assert_close(received.double(), expected_received, rtol=1e-4, atol=2e-6)
    again = fused.ragged_decode_attention(*case, softmax, run=run, received=received)
    assert torch.equal(output, again)


def _filled_with_nan(tensor, *shape, empty=torch.Tensor.new_empty, **options):
    result = empty(tensor, *shape, **options)
    return result.fill_(float("nan")) if result.is_floating_point() else result


def _same_dtype(case, run, softmax):
    """Plain torch without a matmul in a dtype above the inputs'; where there are caps or sinks, the naive form."""
    query, keys, values, positions, offsets = case
    keys = keys.nan_to_num()
    if not softmax.is_plain or run is not None:
        return naive.ragged_decode_attention(query, keys, *case[2:], softmax, run=run)
    outputs, group = [], query.shape[1] // (len(offsets) - 1)
    for head, (start, stop) in enumerate(pairwise(offsets)):
        mask = (positions[:, start:stop] >= 0)[:, None, None]
        blind = ~mask.any(3, keepdim=True)
        own = slice(head * group, (head + 1) * group)
        key, value = (x[:, None, start:stop].expand(-1, group, -1, -1) for x in (keys, values))
        logits = (query[:, own] @ key.transpose(2, 3) * softmax.scale).masked_fill(~(mask | blind), float("-inf"))
        outputs.append((logits.softmax(3) @ value).masked_fill(blind, 0.0))
    return torch.cat(outputs, dim=1)


SMALL = [
    ([1], 1, (16, 16), {}),
    ([9, 9], 3, (16, 8), dict(softcap=2.0, with_sinks=True)),
    ([70, 70], 4, (16, 16), dict(with_sinks=True)),
    ([3, 150, 1], 3, (24, 40), {}),
    ([3, 150, 1], 2, (16, 16), dict(softcap=5.0)),
    ([40, 90], 3, (16, 24), dict(tokens=5, with_sinks=True)),
    ([40, 40], 16, (16, 16), dict(tokens=16, softcap=3.0)),
    ([3, 150], 2, (16, 16), dict(tokens=2)),
]


@interpreted
@pytest.mark.parametrize(("sizes", "group", "dims", "options"), SMALL)
def test_small_cases(sizes, group, dims, options):
    check(sizes, group, dims, dtype=torch.float32, device="cpu", **options)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("sizes", "group", "dims", "options"), SMALL)
def test_small_cases_on_a_gpu(sizes, group, dims, options, dtype):
    check(sizes, group, dims, dtype=dtype, device="cuda", **options)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dims", [(64, 64), (80, 80), (96, 96), (128, 128), (192, 128), (256, 256)])
@pytest.mark.parametrize(
    ("sizes", "group", "options"),
    [
        ([513, 513], 4, dict(with_sinks=True)),
        ([1000, 65, 2300], 3, dict(softcap=30.0)),
        ([129, 700], 16, {}),
        ([257, 64], 8, dict(tokens=16)),
    ],
)
def test_matrix_on_a_gpu(sizes, group, dims, options, dtype):
    check(sizes, group, dims, dtype=dtype, device="cuda", **options)


@pytest.mark.gpu
@pytest.mark.parametrize(("batch", "size"), [(256, 300), (1, 30_000), (33, 1025)])
def test_batches_and_lengths_on_a_gpu(batch, size):
    """Against plain torch in fp64 by scaled_dot_product_attention: loops take too long."""
    generator = torch.Generator("cuda").manual_seed(0)
    query = torch.randn(batch, 8, 1, 128, generator=generator, device="cuda")
    keys, values = torch.randn(2, batch, 2 * size, 128, generator=generator, device="cuda").bfloat16().unbind()
    positions = torch.randint(-1, 3, (batch, 2 * size), generator=generator, device="cuda")
    case = (query.bfloat16(), keys, values, positions, (0, size, 2 * size))
    output = fused.ragged_decode_attention(*case, Softmax(0.1))
    grouped, *entries = (x.double().view(batch, 2, -1, 128) for x in case[:3])
    mask = (positions >= 0).view(batch, 2, 1, size)
    expected = F.scaled_dot_product_attention(grouped, *entries, attn_mask=mask, scale=0.1).view(output.shape)
    assert (output - expected).abs().max() < 2**-8 * expected.abs().max()


@pytest.mark.gpu
@pytest.mark.parametrize("early", [False, True])
def test_a_captured_call_is_replayed(early, monkeypatch):
    case, _, _ = inputs([300, 40], 4, 64, 64, dtype=torch.bfloat16, device="cuda")
    expected = ragged_decode_attention(*case, Softmax(0.1))
    monkeypatch.setattr(fused, "SUM_BEGINS_EARLY", early)
    ragged_decode_attention(*case, Softmax(0.1))  # compiles what it needs
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(4):  # each takes the memory of the one before
            output = ragged_decode_attention(*case, Softmax(0.1))
    for _ in range(3):
        output.zero_()
        graph.replay()
        assert torch.equal(output, expected)
    case[3].fill_(-1)
    graph.replay()
    assert (output == 0).all()


@pytest.mark.parametrize("device", DEVICES)
def test_compiles_without_a_break(device, monkeypatch):
    monkeypatch.setenv(VARIABLE, "fused")
    case, run, _ = inputs([9, 20], 2, 16, 16, tokens=3, device=device)
    compiled = torch.compile(
        ragged_decode_attention, fullgraph=True, backend="aot_eager" if device == "cpu" else "inductor"
    )
    one = (case[0][:, :, :1], *case[1:])
    received = torch.empty(2, 29, device=device)
    output = compiled(*one, Softmax(0.3), received=received)
    expected = torch.empty_like(received)
    assert torch.equal(output, ragged_decode_attention(*one, Softmax(0.3), received=expected))
    assert torch.equal(received, expected)
    assert torch.equal(compiled(*case, Softmax(0.3), run=run), ragged_decode_attention(*case, Softmax(0.3), run=run))


def test_every_slot_is_in_one_part(monkeypatch):
    monkeypatch.setattr(parts, "multiprocessors", lambda device: 3)
    for sizes in ([1], [64, 64], [65, 65, 65], [3, 5000, 1, 70]):
        offsets = tuple(accumulate(sizes, initial=0))
        for rows in (1, 4, 1000):
            for with_run in (False, True):
                division = parts_of(offsets, rows, 64, torch.device("cpu"), with_run)
                assert division.length % 64 == 0 and len(division.table) == division.total
                seen = torch.zeros(offsets[-1], dtype=torch.int64)
                for part, (head, slot, size, begin) in enumerate(division.table.tolist()):
                    assert (slot, size) == (offsets[head], sizes[head])
                    count, first = division.head_parts[head].tolist()
                    assert first <= part < first + count
                    seen[slot + begin : slot + min(begin + division.length, size)] += 1
                assert (seen == 1).all() and division.most <= parts.MOST_PARTS
                if with_run:  # the last part of every head begins where its slots end
                    assert all(
                        division.table[f + c - 1, 3] == s for (c, f), s in zip(division.head_parts, sizes, strict=True)
                    )
                assert (division.per_head > 0) == (len(set(sizes)) == 1)


@interpreted
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(query=torch.zeros(1, 2, 1, 16, dtype=torch.float64)), "float64"),
        (dict(query=torch.zeros(1, 2, 1, 512)), "up to 256"),
        (dict(keys=torch.zeros(1, 16, 9).transpose(1, 2)), "contiguous"),
    ],
)
def test_what_the_kernel_does_not_take_is_refused(change, message):
    good = dict(query=torch.zeros(1, 2, 1, 16), keys=torch.zeros(1, 9, 16), values=torch.zeros(1, 9, 16))
    good |= dict(positions=torch.zeros(1, 9).long(), head_offsets=(0, 4, 9), softmax=Softmax(1.0))
    fused.ragged_decode_attention(**good)
    with pytest.raises(ValueError, match=message):
        fused.ragged_decode_attention(**(good | change))
