"""ragged_decode_attention against scaled_dot_product_attention over what each head holds, in fp64."""

from itertools import accumulate, pairwise
from unittest import mock

import pytest
import torch
import torch.nn.functional as F

from retention_gates.kernels.dispatch import VARIABLE
from retention_gates.kernels.ragged_decode_attention import entry_weights, naive, ragged_decode_attention
from retention_gates.kernels.softmax import Softmax


def inputs(sizes, group, head_dim, value_dim, batch=2, dtype=torch.float64, seed=0):
    torch.manual_seed(seed)
    offsets = tuple(accumulate(sizes, initial=0))
    query = torch.randn(batch, len(sizes) * group, 1, head_dim, dtype=dtype)
    keys = torch.randn(batch, offsets[-1], head_dim, dtype=dtype)
    values = torch.randn(batch, offsets[-1], value_dim, dtype=dtype)
    positions = torch.randint(-1, 3, (batch, offsets[-1]))  # a quarter is empty
    return query, keys, values, positions, offsets


def expected(query, keys, values, positions, offsets, scale):
    batch, query_heads = query.shape[:2]
    group = query_heads // (len(offsets) - 1)
    output = torch.zeros(batch, query_heads, 1, values.shape[-1], dtype=query.dtype)
    for row in range(batch):
        for head in range(query_heads):
            own = torch.arange(offsets[head // group], offsets[head // group + 1])
            own = own[positions[row, own] >= 0]
            if len(own):
                one = F.scaled_dot_product_attention(query[row, head], keys[row, own], values[row, own], scale=scale)
                output[row, head] = one
    return output


@pytest.mark.parametrize("group", [1, 3, 4])
@pytest.mark.parametrize("sizes", [[1], [7, 7, 7], [3, 65, 2, 1]])
def test_equals_attention_over_what_is_held(sizes, group):
    case = inputs(sizes, group, head_dim=12, value_dim=5)
    output = ragged_decode_attention(*case, Softmax(0.4))
    assert output.dtype == torch.float64
    # computed in fp32
    torch.testing.assert_close(output, expected(*case, scale=0.4), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("sizes", [[1], [7, 7, 7], [3, 65, 2, 1], [5, 5, 9]])
def test_slots_that_are_all_taken(sizes, monkeypatch):
    query, keys, values, positions, offsets = inputs(sizes, 3, head_dim=12, value_dim=5, dtype=torch.float32)
    positions[:] = 0
    exact = expected(query.double(), keys.double(), values.double(), positions, offsets, scale=0.4)
    monkeypatch.setenv(VARIABLE, "naive")
    rounded = ragged_decode_attention(query, keys, values, positions, offsets, Softmax(0.4))
    monkeypatch.delenv(VARIABLE)
    with mock.patch.object(naive, "ragged_decode_attention", wraps=naive.ragged_decode_attention) as equation:
        output = ragged_decode_attention(query, keys, values, positions, offsets, Softmax(0.4))
        assert not equation.called
        positions[1, -1] = -1
        ragged_decode_attention(query, keys, values, positions, offsets, Softmax(0.4))
        assert equation.called
    assert output.shape == rounded.shape and output.is_contiguous()
    limit = 2 * (rounded - exact).abs().max() + torch.finfo(torch.float32).eps
    assert (output - exact).abs().max() <= limit


def test_bf16_is_rounded_once():
    query, keys, values, positions, offsets = inputs([40, 9], 2, 16, 16, dtype=torch.bfloat16)
    output = ragged_decode_attention(query, keys, values, positions, offsets, Softmax(0.25))
    exact = expected(query.double(), keys.double(), values.double(), positions, offsets, scale=0.25)
    assert output.dtype == torch.bfloat16
    torch.testing.assert_close(output, exact.bfloat16(), rtol=2**-7, atol=1e-5)  # at most one step of bf16


def test_a_head_that_holds_nothing_gives_zero():
    query, keys, values, positions, offsets = inputs([4, 4], 2, 8, 8)
    positions[1, :4] = -1
    output = ragged_decode_attention(query, keys, values, positions, offsets, Softmax(1.0))
    assert (output[1, :2] == 0).all() and (output[1, 2:] != 0).all() and (output[0] != 0).all()


def test_softcap_and_sinks():
    query, keys, values, positions, offsets = inputs([6, 3], 2, 8, 4, batch=1)
    positions[:] = 0
    sinks = torch.tensor([0.5, -1.0, 2.0, 0.0], dtype=torch.float64)
    output = ragged_decode_attention(query, keys, values, positions, offsets, Softmax(0.7, 2.0, sinks))
    for head, own in ((0, slice(0, 6)), (1, slice(0, 6)), (2, slice(6, 9)), (3, slice(6, 9))):
        logits = 2.0 * torch.tanh(query[0, head, 0] @ keys[0, own].T * 0.7 / 2.0)
        weights = torch.exp(logits) / (torch.exp(logits).sum() + torch.exp(sinks[head]))
        torch.testing.assert_close(output[0, head, 0], weights @ values[0, own], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(query=torch.zeros(2, 4, 2, 8)), "one token"),
        (dict(query=torch.zeros(2, 3, 1, 8)), "multiple"),
        (dict(keys=torch.zeros(2, 6, 8)), "keys"),
        (dict(values=torch.zeros(1, 7, 8)), "values"),
        (dict(positions=torch.zeros(2, 6)), "positions"),
        (dict(keys=torch.zeros(2, 7, 8, dtype=torch.bfloat16)), "dtype"),
        (dict(softmax=Softmax(1.0, 0.0)), "softcap"),
        (dict(softmax=Softmax(1.0, None, torch.zeros(2))), "sinks"),
        (dict(received=torch.zeros(2, 6)), "received"),
    ],
)
def test_bad_arguments(change, message):
    good = dict(
        query=torch.zeros(2, 4, 1, 8),
        keys=torch.zeros(2, 7, 8),
        values=torch.zeros(2, 7, 8),
        positions=torch.zeros(2, 7, dtype=torch.int64),
        head_offsets=(0, 3, 7),
        softmax=Softmax(1.0),
    )
    ragged_decode_attention(**good)
    with pytest.raises(ValueError, match=message):
        ragged_decode_attention(**(good | change))


@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("with_sinks", [False, True])
def test_weights_are_what_each_slot_received(softcap, with_sinks):
    sizes, group = [3, 65, 2, 1], 3
    query, keys, _, positions, offsets = inputs(sizes, group, head_dim=12, value_dim=5)
    sinks = torch.linspace(-1, 2, 12, dtype=torch.float64) if with_sinks else None
    softmax = Softmax(0.4, softcap, sinks)
    # one-hot values make the output the weights themselves
    values = torch.eye(offsets[-1], dtype=torch.float64).expand(2, -1, -1)
    received = torch.full((2, offsets[-1]), float("nan"))
    output = ragged_decode_attention(query, keys, values, positions, offsets, softmax, received=received)
    assert torch.equal(output, ragged_decode_attention(query, keys, values, positions, offsets, softmax))
    torch.testing.assert_close(received.double(), output[:, :, 0].sum(1), rtol=1e-5, atol=1e-6)

    # the same from the op for many queries, each of which is one call of the other
    queries = torch.cat([query, query.flip(3), -query], dim=2)  # [B, HQ, 3, D]
    by_head = torch.zeros(2, 4, 65, 12, dtype=torch.float64)
    visible = torch.zeros(2, 4, 3, 65, dtype=torch.bool)
    for head, (start, stop) in enumerate(pairwise(offsets)):
        by_head[:, head, : stop - start] = keys[:, start:stop]
        visible[:, head, :, : stop - start] = (positions[:, start:stop] >= 0)[:, None]
    visible[:, :, 2] = False
    many = entry_weights(queries, by_head, visible, softmax)
    assert many.shape == (2, 4, 3, 65) and (many[:, :, 2] == 0).all()
    for n in (0, 1):
        ragged_decode_attention(queries[:, :, n : n + 1], keys, values, positions, offsets, softmax, received=received)
        for head, (start, stop) in enumerate(pairwise(offsets)):
            torch.testing.assert_close(many[:, head, n, : stop - start], received[:, start:stop], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(keys=torch.zeros(2, 6, 8)), "must be"),
        (dict(query=torch.zeros(2, 3, 5, 8)), "multiple"),
        (dict(keys=torch.zeros(2, 2, 7, 9)), "keys"),
        (dict(visible=torch.ones(2, 2, 5, 6).bool()), "visible"),
        (dict(softmax=Softmax(1.0, -1.0)), "softcap"),
        (dict(softmax=Softmax(1.0, None, torch.zeros(2))), "sinks"),
    ],
)
def test_bad_arguments_of_entry_weights(change, message):
    good = dict(
        query=torch.zeros(2, 4, 5, 8),
        keys=torch.zeros(2, 2, 7, 8),
        visible=torch.ones(1, 1, 5, 7).bool(),
        softmax=Softmax(1.0),
    )
    entry_weights(**good)
    with pytest.raises(ValueError, match=message):
        entry_weights(**(good | change))
