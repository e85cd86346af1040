"""Retention-gated attention against a case worked by hand, a dense fp64 form, and plain attention."""

import math

import pytest
import torch
import torch.nn.functional as F
from attention_cases import (
    HOLES,
    PACKED,
    PADDED,
    dense_attention,
    in_fp64,
    make_eviction_times,
    make_inputs,
    output_and_gradients,
)
from hypothesis import given
from hypothesis import strategies as st
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

from retention_gates.kernels.retention_attention import naive, retention_attention

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


def test_by_hand():
    """Keys that don't matter leave exp(age * log_beta): 1/3 against 1 for the second token, 1/4 and 3/4."""
    query, key = torch.zeros(1, 1, 2, 1), torch.ones(1, 1, 2, 1)
    value = torch.tensor([8.0, 4.0]).view(1, 1, 2, 1)
    log_beta = torch.tensor([math.log(1 / 3), -9.0]).view(1, 1, 2)
    output = retention_attention(query, key, value, log_beta, scale=1.0)
    torch.testing.assert_close(output.flatten(), torch.tensor([8.0, 5.0]))
    # a sink of 2/3 beside 1/3 and 1: weights 1/6 and 1/2; for the first token 1 beside 2/3
    output = retention_attention(query, key, value, log_beta, scale=1.0, sinks=torch.tensor([math.log(2 / 3)]))
    torch.testing.assert_close(output.flatten(), torch.tensor([8 * 3 / 5, 8 / 6 + 2]))


def test_softcap_comes_before_the_bias():
    """Logits of 4e3 and 8e3 are both capped to 2, so only the bias tells the tokens apart."""
    query, key = torch.full((1, 1, 2, 1), 4e3), torch.tensor([1.0, 2.0]).view(1, 1, 2, 1)
    value = torch.tensor([8.0, 4.0]).view(1, 1, 2, 1)
    log_beta = torch.tensor([math.log(1 / 3), 0.0]).view(1, 1, 2)
    output = retention_attention(query, key, value, log_beta, scale=1.0, softcap=2.0)
    torch.testing.assert_close(output.flatten(), torch.tensor([8.0, 5.0]))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("group", [1, 3, 4])
@pytest.mark.parametrize(
    ("tokens", "document_ids"), [(1, None), (2, None), (11, None), (131, None), (11, PACKED), (11, PADDED)]
)
@pytest.mark.parametrize("options", [{}, {"softcap": 3.0}, {"sinks": True}, {"gaussian": True}])
def test_matches_dense_fp64(device, group, tokens, document_ids, options):
    """131 tokens are two chunks of naive.py; with fp64 in, the error is that of fp64."""
    batch = 2 if document_ids is None else len(document_ids)
    options = dict(options)
    shape = (batch, 2, group, tokens)
    inputs = make_inputs(*shape, device=device, sinks=options.pop("sinks", False))
    options |= {"scale": 0.3, "document_ids": None if document_ids is None else document_ids.to(device)}
    expected = output_and_gradients(dense_attention, in_fp64(inputs), **options)

    exact = output_and_gradients(naive.retention_attention, in_fp64(inputs), **options)
    single = output_and_gradients(retention_attention, inputs, **options)
    for name, reference in expected.items():
        torch.testing.assert_close(exact[name], reference, rtol=1e-10, atol=1e-11, msg=lambda m, n=name: f"{n}: {m}")
        # some tens of roundings of 6e-8 each, times ages up to 130 in the gradient of log_beta
        tolerance = 2e-6 * max(1.0, reference.abs().max().item())
        torch.testing.assert_close(single[name].double(), reference, rtol=1e-5, atol=tolerance)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("document_ids", [None, PACKED, PADDED, HOLES])
@pytest.mark.parametrize("sliding_window", [None, 1, 3, 12])
@pytest.mark.parametrize("evicted", [False, True])
@pytest.mark.parametrize("sinks", [False, True])
def test_limits_match_dense_fp64(device, document_ids, sliding_window, evicted, sinks):
    """Windows, evictions and documents together; rows that see no key give 0, also beside a sink."""
    inputs = make_inputs(2 if document_ids is None else len(document_ids), 2, 2, 11, device=device, sinks=sinks)
    options = {
        "scale": 0.3,
        "document_ids": None if document_ids is None else document_ids.to(device),
        "sliding_window": sliding_window,
        "eviction_times": make_eviction_times(len(inputs["query"]), 2, 11, device) if evicted else None,
    }
    expected = output_and_gradients(dense_attention, in_fp64(inputs), **options)
    exact = output_and_gradients(naive.retention_attention, in_fp64(inputs), **options, chunk_size=4)
    single = output_and_gradients(retention_attention, inputs, **options)
    assert expected["output"].any()
    if evicted:
        assert not single["output"][:, 2:].any()  # the second KV head holds nothing
    for name, reference in expected.items():
        torch.testing.assert_close(exact[name], reference, rtol=1e-10, atol=1e-11, msg=lambda m, n=name: f"{n}: {m}")
        # as above; the gradient of a query that sees one key is the difference of two sums that differ in their order
        tolerance = 1e-5 * max(1.0, reference.abs().max().item())
        torch.testing.assert_close(single[name].double(), reference, rtol=1e-5, atol=tolerance)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_rounds_only_the_output(dtype):
    inputs = make_inputs(2, 2, 3, 70, dtype=dtype)
    output = retention_attention(**inputs, scale=0.35)
    expected = dense_attention(**in_fp64(inputs), scale=0.35)
    assert output.dtype == dtype
    torch.testing.assert_close(output.double(), expected, rtol=torch.finfo(dtype).eps, atol=1e-6)


def test_autocast_leaves_the_logits_in_fp32():
    inputs = make_inputs(1, 2, 3, 33)
    expected = output_and_gradients(retention_attention, inputs, scale=0.35)

    def under_autocast(**arguments):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return retention_attention(**arguments)

    actual = output_and_gradients(under_autocast, inputs, scale=0.35)
    for name, tensor in expected.items():
        assert torch.equal(actual[name], tensor), name


@pytest.mark.parametrize("gaussian", [False, True])
@pytest.mark.parametrize("sinks", [False, True])
def test_gradcheck(sinks, gaussian):
    inputs = make_inputs(2, 1, 2, 5, head_dim=2, value_dim=3, dtype=torch.float64, sinks=sinks)
    document_ids = torch.tensor([[0, 0, 0, 1, 1], [-1, 0, 0, 0, -1]])

    def attention(*tensors):
        options = {"scale": 0.7, "document_ids": document_ids, "softcap": 2.0, "gaussian": gaussian, "chunk_size": 2}
        return naive.retention_attention(**dict(zip(inputs, tensors, strict=True)), **options)

    assert torch.autograd.gradcheck(attention, tuple(inputs.values()))


def test_log_beta_of_zero_is_plain_attention():
    inputs = make_inputs(2, 2, 3, 50, value_dim=8)
    inputs["log_beta"] = torch.zeros(2, 2, 50)
    output = retention_attention(**inputs, scale=0.3)
    query, key, value = inputs["query"], inputs["key"], inputs["value"]
    plain = F.scaled_dot_product_attention(query, key, value, is_causal=True, scale=0.3, enable_gqa=True)
    torch.testing.assert_close(output, plain)


@pytest.mark.parametrize("chunk_size", [1, 7, 50, 64])
def test_chunks_change_nothing(chunk_size):
    inputs = make_inputs(1, 2, 2, 50, dtype=torch.float64)
    expected = output_and_gradients(naive.retention_attention, inputs, scale=0.3)
    actual = output_and_gradients(naive.retention_attention, inputs, scale=0.3, chunk_size=chunk_size)
    for name, tensor in expected.items():
        torch.testing.assert_close(actual[name], tensor, msg=lambda m, n=name: f"{n}: {m}")


@given(lengths=st.lists(st.integers(1, 9), min_size=1, max_size=5), left=st.integers(0, 5), right=st.integers(0, 5))
def test_documents_and_padding_do_not_see_each_other(lengths, left, right):
    """A packed row with padding around it gives what each document gives alone, and nothing at the padding."""
    tokens = left + sum(lengths) + right
    inputs = {name: tensor.detach() for name, tensor in make_inputs(1, 1, 2, tokens).items()}
    documents = [index for index, length in enumerate(lengths) for _ in range(length)]
    document_ids = torch.tensor([[-1] * left + documents + [-1] * right])
    output = retention_attention(**inputs, scale=0.3, document_ids=document_ids)
    start = left
    for length in lengths:
        part = slice(start, start + length)
        alone = retention_attention(**{name: tensor[:, :, part] for name, tensor in inputs.items()}, scale=0.3)
        torch.testing.assert_close(output[:, :, part], alone)
        start += length
    assert not output[:, :, document_ids[0] < 0].any()


def test_padding_gives_no_gradient_whatever_it_holds():
    inputs = make_inputs(3, 2, 2, 11)
    padding = PADDED < 0
    with torch.no_grad():
        for name in ("query", "key", "value"):
            inputs[name].transpose(1, 2)[padding] = 1e18
    result = output_and_gradients(retention_attention, inputs, scale=0.3, document_ids=PADDED)
    assert not result.pop("output").transpose(1, 2)[padding].any()
    for name, gradient in result.items():
        assert gradient.isfinite().all(), name
        assert not gradient.transpose(1, 2)[padding].any(), name
        assert gradient.transpose(1, 2)[~padding].any(), name


def largest_saved_tensor(attention, inputs, **options):
    sizes = [0]

    def pack(tensor):
        sizes.append(tensor.numel())
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        output = attention(**inputs, **options)
    assert output.requires_grad
    return max(sizes)


@pytest.mark.parametrize("wanted", [("log_beta",), ("query", "key", "value", "log_beta")])
def test_nothing_square_is_kept_for_backward(wanted):
    tokens = 300
    inputs = make_inputs(1, 1, 3, tokens, head_dim=4, value_dim=4)
    inputs = {name: tensor.detach().requires_grad_(name in wanted) for name, tensor in inputs.items()}
    assert largest_saved_tensor(dense_attention, inputs, scale=0.3) >= tokens**2  # the measure sees what it should
    assert largest_saved_tensor(retention_attention, inputs, scale=0.3) <= inputs["query"].numel()


def test_inside_a_checkpointed_layer():
    """A model under gradient checkpointing nests our checkpoint in its own."""
    inputs = make_inputs(1, 2, 2, 150)
    expected = output_and_gradients(retention_attention, inputs, scale=0.3)

    def layer(**tensors):
        return checkpoint(lambda: retention_attention(**tensors, scale=0.3), use_reentrant=False)

    actual = output_and_gradients(layer, inputs)
    for name, tensor in expected.items():
        assert torch.equal(actual[name], tensor), name


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"query": torch.zeros(2, 5, 7, 8)}, "query has 5 heads"),
        ({"query": torch.zeros(2, 4, 6, 8)}, "query must have shape"),
        ({"query": torch.zeros(2, 4, 7)}, "query must have 4 axes"),
        ({"key": torch.zeros(2, 2, 7, 9)}, "key must have shape"),
        ({"key": torch.zeros(2, 2, 7, 8, dtype=torch.bfloat16)}, "key is torch.bfloat16"),
        ({"value": torch.zeros(2, 2, 8, 8)}, "value must have shape"),
        ({"value": torch.zeros(2, 2, 7, 8, device="meta")}, "value is on meta"),
        ({"log_beta": torch.zeros(2, 2, 7, dtype=torch.bfloat16)}, "log_beta must be torch.float32"),
        ({"log_beta": torch.zeros(2, 7)}, "log_beta must have shape"),
        ({"log_beta": torch.full((2, 2, 7), 1e-3)}, "log_beta must be finite and <= 0"),
        ({"log_beta": torch.full((2, 2, 7), math.nan)}, "log_beta must be finite and <= 0"),
        ({"log_beta": torch.full((2, 2, 7), -math.inf)}, "log_beta must be finite and <= 0"),
        ({"document_ids": torch.zeros(2, 6, dtype=torch.int64)}, "document_ids must have shape"),
        ({"document_ids": torch.zeros(2, 7)}, "document_ids must be torch.int64"),
        ({"softcap": 0.0}, "softcap must be above 0"),
        ({"sinks": torch.zeros(2)}, "sinks must have shape"),
        ({"scale": 0.0}, "scale must be a number above 0, not 0.0"),
        ({"scale": -0.5}, "scale must be a number above 0, not -0.5"),
        ({"scale": math.nan}, "scale must be a number above 0, not nan"),
        ({"scale": math.inf}, "scale must be a number above 0, not inf"),
        ({"sliding_window": 0}, "sliding_window must be at least 1 key, not 0"),
        ({"eviction_times": torch.zeros(2, 7, dtype=torch.int64)}, "eviction_times must have shape"),
        ({"eviction_times": torch.zeros(2, 2, 7, dtype=torch.int32)}, "eviction_times must be torch.int64"),
        ({"eviction_times": torch.zeros(2, 2, 7).long().to("meta")}, "eviction_times is on meta"),
    ],
)
def test_bad_arguments_are_named(change, message):
    arguments = {
        "query": torch.zeros(2, 4, 7, 8),
        "key": torch.zeros(2, 2, 7, 8),
        "value": torch.zeros(2, 2, 7, 8),
        "log_beta": torch.zeros(2, 2, 7),
        "scale": 1.0,
    }
    retention_attention(**arguments)
    with pytest.raises(ValueError, match=message):
        retention_attention(**(arguments | change))
