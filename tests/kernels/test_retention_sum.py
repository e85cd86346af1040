"""Retained mass against a case worked by hand, a plain-Python sum and its gradients."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from retention_gates.kernels.retention_sum import naive, retention_sum

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


def dense_sum(log_beta, document_ids):
    """The equation in fp64, one term at a time."""
    tokens = log_beta.shape[-1]
    columns = []
    for t in range(tokens):
        terms = [torch.zeros_like(log_beta[:, :, 0])]
        for i in range(t + 1):
            same = (document_ids[:, t] == document_ids[:, i]) & (document_ids[:, t] >= 0)
            terms.append(torch.exp((t - i) * log_beta[:, :, i]) * same[:, None])
        columns.append(torch.stack(terms).sum(0))
    return torch.stack(columns, dim=-1)


def random_log_beta(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    log_beta = -torch.exp(3 * torch.randn(*shape, generator=generator) - 3)
    log_beta[..., :2] = 0  # protected
    return log_beta


def test_by_hand():
    """beta 1/2, 1 (protected), 1/4: 1; 1/2 + 1; 1/4 + 1 + 1; 1/8 + 1 + 1/4 + 1."""
    log_beta = torch.tensor([0.5, 1.0, 0.25, 0.1]).log().view(1, 1, 4)
    torch.testing.assert_close(retention_sum(log_beta).flatten(), torch.tensor([1.0, 1.5, 2.25, 2.375]))
    # padding, then a document of two, then one of one
    document_ids = torch.tensor([[-1, 0, 0, 1]])
    mass = retention_sum(log_beta, document_ids=document_ids)
    torch.testing.assert_close(mass.flatten(), torch.tensor([0.0, 1.0, 2.0, 1.0]))


def test_a_protected_row_counts_its_tokens():
    mass = retention_sum(torch.zeros(2, 3, 600))
    assert torch.equal(mass, torch.arange(1, 601).float().expand(2, 3, 600))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("chunk_size", [1, 5, 13, 256])
@pytest.mark.parametrize("layout", ["one document", "packed", "padded", "empty row"])
@pytest.mark.parametrize("tokens", [1, 2, 13])
def test_matches_the_equation_in_fp64(device, chunk_size, layout, tokens):
    document_ids = torch.zeros(2, tokens, dtype=torch.int64)
    if layout == "packed":
        document_ids[0] = torch.arange(tokens) // 4
    elif layout == "padded":
        document_ids[0, : tokens // 3] = -1
        document_ids[1, tokens - tokens // 3 :] = -1
    elif layout == "empty row":
        document_ids[1] = -1
    log_beta = random_log_beta(2, 3, tokens).to(device)
    document_ids = document_ids.to(device)
    argument = None if layout == "one document" else document_ids

    reference = log_beta.double().requires_grad_()
    expected = dense_sum(reference, document_ids)
    seed = torch.randn(expected.shape, dtype=torch.float64, device=device)
    (expected_gradient,) = torch.autograd.grad(expected, reference, seed)
    for dtype, tolerance in ((torch.float64, 1e-12), (torch.float32, 1e-5)):
        inputs = log_beta.to(dtype).requires_grad_()
        op = naive.retention_sum if dtype == torch.float64 else retention_sum
        mass = op(inputs, document_ids=argument, chunk_size=chunk_size)
        (gradient,) = torch.autograd.grad(mass, inputs, seed.to(dtype))
        torch.testing.assert_close(mass.double(), expected.detach(), rtol=tolerance, atol=tolerance)
        torch.testing.assert_close(gradient.double(), expected_gradient, rtol=tolerance, atol=tolerance)


def test_gradcheck():
    log_beta = random_log_beta(2, 2, 7).double().requires_grad_()
    document_ids = torch.tensor([[0, 0, 0, 0, 1, 1, 1], [-1, -1, 0, 0, 0, 0, -1]])
    assert torch.autograd.gradcheck(
        lambda x: naive.retention_sum(x, document_ids=document_ids, chunk_size=3), (log_beta,)
    )


@given(lengths=st.lists(st.integers(1, 30), min_size=1, max_size=4), left=st.integers(0, 9), seed=st.integers(0, 99))
def test_documents_start_anew(lengths, left, seed):
    log_beta = random_log_beta(1, 2, left + sum(lengths), seed=seed)
    documents = [index for index, length in enumerate(lengths) for _ in range(length)]
    mass = retention_sum(log_beta, document_ids=torch.tensor([[-1] * left + documents]), chunk_size=16)
    assert not mass[:, :, :left].any()
    start = left
    for length in lengths:
        part = slice(start, start + length)
        torch.testing.assert_close(mass[:, :, part], retention_sum(log_beta[:, :, part]))
        start += length


def test_nothing_square_is_kept_for_backward():
    sizes = []
    log_beta = random_log_beta(1, 1, 300).requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(lambda x: sizes.append(x.numel()) or x, lambda x: x):
        retention_sum(log_beta, chunk_size=50)
    assert sizes and max(sizes) <= 300


def test_extreme_rates_stay_finite():
    log_beta = torch.tensor([-1e-9, -40.0, -3e4, -1e30]).repeat(64).view(1, 1, 256).requires_grad_()
    mass = retention_sum(log_beta)
    mass.sum().backward()
    assert mass.isfinite().all() and log_beta.grad.isfinite().all()
    assert mass[0, 0, -1].item() == pytest.approx(65)  # 64 that last and the newest


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"log_beta": torch.zeros(2, 3)}, "log_beta must have shape"),
        ({"log_beta": torch.zeros(2, 3, 0)}, "log_beta must have shape"),
        ({"log_beta": torch.zeros(2, 3, 4, dtype=torch.float64)}, "log_beta must be torch.float32"),
        ({"log_beta": torch.full((2, 3, 4), 0.1)}, "log_beta must be finite and <= 0"),
        ({"log_beta": torch.full((2, 3, 4), math.nan)}, "log_beta must be finite and <= 0"),
        ({"document_ids": torch.zeros(2, 3, dtype=torch.int64)}, "document_ids must have shape"),
        ({"document_ids": torch.zeros(2, 4, dtype=torch.int32)}, "document_ids must be torch.int64"),
        ({"document_ids": torch.zeros(2, 4, dtype=torch.int64, device="meta")}, "document_ids is on meta"),
        ({"chunk_size": 0}, "chunk_size must be at least 1"),
    ],
)
def test_bad_arguments_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        retention_sum(**({"log_beta": torch.zeros(2, 3, 4)} | arguments))
