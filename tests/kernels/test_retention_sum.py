"""Retained mass against a case worked by hand, a plain-Python sum and its gradients; fused forms against fp64."""

import math
import os
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from retention_gates.kernels.retention_sum import naive, retention_sum, retention_sum_over_heads

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
    for over_heads in (False, True):
        assert torch.autograd.gradcheck(
            lambda x, total=over_heads: naive.retention_sum(
                x, document_ids=document_ids, chunk_size=3, over_heads=total
            ),
            (log_beta,),
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
        ({"document_ids": torch.tensor([[5, 5, 2, 2], [5, 2, -1, 5]])}, "one piece, but document 5 goes on"),
        ({"chunk_size": 0}, "chunk_size must be at least 1"),
    ],
)
def test_bad_arguments_are_named(arguments, message):
    for op in (retention_sum, retention_sum_over_heads):
        with pytest.raises(ValueError, match=message):
            op(**({"log_beta": torch.zeros(2, 3, 4)} | arguments))


def test_over_heads_is_the_sum_of_the_heads():
    log_beta = random_log_beta(2, 3, 30)
    document_ids = torch.tensor([[0] * 11 + [1] * 19, [-1] * 4 + [3] * 20 + [-1] * 6])
    expected = retention_sum(log_beta, document_ids=document_ids).sum(1)
    total = retention_sum_over_heads(log_beta, document_ids=document_ids, chunk_size=7)
    torch.testing.assert_close(total, expected)


# What follows runs the kernels: in the interpreter at small sizes, on a GPU at larger ones.
CASES = [
    pytest.param("cpu", 1, "padded", id="cpu-1"),
    pytest.param("cpu", 65, "one document", id="cpu-65"),
    pytest.param("cpu", 150, "packed", id="cpu-150-packed"),
    *[
        pytest.param("cuda", tokens, layout, id=f"cuda-{tokens}-{layout}", marks=pytest.mark.gpu)
        for tokens in (1, 31, 512, 1000, 4099, 20_000)
        for layout in ("one document", "packed", "padded")
    ],
]
FORMS = ["exact", "linear"]


def full_of_nan(allocate):
    def allocate_and_fill(*args, **options):
        tensor = allocate(*args, **options)
        return tensor.fill_(math.nan) if tensor.is_floating_point() else tensor

    return allocate_and_fill


@pytest.fixture
def kernels(monkeypatch):
    """Makes fused kernels run on any device, on fresh memory full of NaN; call it to fix the form."""
    pytest.importorskip("triton")
    from retention_gates.kernels.retention_sum import fused

    monkeypatch.setenv("RETENTION_GATES_KERNELS", "fused")
    for owner, name in ((torch.Tensor, "new_empty"), (torch, "empty_like")):
        monkeypatch.setattr(owner, name, full_of_nan(getattr(owner, name)))
    if os.environ.get("TRITON_INTERPRET") == "1":  # a scan step costs the interpreter milliseconds; 2 make it carry
        monkeypatch.setattr(fused, "SETTINGS", replace(fused.SETTINGS, scan_chunks=2, project_chunks=2))
    return lambda form: monkeypatch.setattr(fused, "LINEAR_FROM", 1 if form == "linear" else 2**40)


def documents(layout, batch, tokens):
    """int64 [B, T] or None; "packed" has a padded end, a long document and many within one chunk of 32 tokens."""
    if layout == "one document":
        return None
    document_ids = torch.zeros(batch, tokens, dtype=torch.int64)
    if layout == "packed":
        lengths = [3, 1, 7, 2, 90, 5, 11, tokens]
        packed = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
        document_ids[0] = packed[:tokens]
        document_ids[-1] = packed[:tokens].flip(0)
        document_ids[-1, tokens - tokens // 10 :] = -1
    else:
        document_ids[0, : tokens // 3] = -1
        document_ids[-1] = -1
    return document_ids


def check_against_fp64(op, over_heads, log_beta, document_ids):
    """Errors below 1e-5 of S, and for gradients of the sum of the absolute values that make one up."""
    reference = log_beta.double().requires_grad_()
    expected = naive.retention_sum(reference, document_ids=document_ids, over_heads=over_heads)
    seed = torch.randn(expected.shape, generator=torch.Generator().manual_seed(1)).to(log_beta.device)
    (expected_gradient,) = torch.autograd.grad(expected, reference, seed.double(), retain_graph=True)
    (scale,) = torch.autograd.grad(expected, reference, seed.double().abs())

    inputs = log_beta.clone().requires_grad_()
    mass = op(inputs, document_ids=document_ids)
    (gradient,) = torch.autograd.grad(mass, inputs, seed)
    assert mass.dtype == gradient.dtype == torch.float32
    assert bool(((mass - expected).abs() <= 1e-5 * expected).all())
    assert bool(((gradient - expected_gradient).abs() <= 1e-5 * scale + 1e-20).all())
    return mass.detach(), gradient


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("device", "tokens", "layout"), CASES)
def test_fused_matches_fp64_and_repeats_itself(kernels, form, device, tokens, layout):
    kernels(form)
    log_beta = random_log_beta(2, 2 if device == "cpu" else 5, tokens).to(device)
    document_ids = documents(layout, 2, tokens)
    document_ids = None if document_ids is None else document_ids.to(device)
    first = check_against_fp64(retention_sum, False, log_beta, document_ids)
    if device == "cuda":
        again = check_against_fp64(retention_sum, False, log_beta, document_ids)
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    check_against_fp64(retention_sum_over_heads, True, log_beta, document_ids)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("form", FORMS)
def test_fused_extreme_rates(kernels, form, device):
    """Rates from 0 to 1e30, each a head of its own and all in one, stay within the bound."""
    kernels(form)
    rates = torch.tensor(
        [0, 1e-9, 0.3, 40, 1e30] if device == "cpu" else [0, 1e-9, 1e-4, 3e-3, 0.3, 0.61, 5, 40, 3e4, 1e30]
    )
    tokens = 100 if device == "cpu" else 3000
    log_beta = -torch.cat([rates[:, None].expand(-1, tokens), rates.repeat(tokens // len(rates))[None]]).to(device)[
        None
    ]
    mass, _gradient = check_against_fp64(retention_sum, False, log_beta, None)
    assert torch.equal(mass[0, -3:-1], torch.ones_like(mass[0, -3:-1]))  # nothing but the newest token is left
    torch.testing.assert_close(mass[0, 0], torch.arange(1.0, tokens + 1, device=device), rtol=1e-6, atol=0)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("form", FORMS)
def test_fused_takes_any_strides_and_repeats_itself(kernels, form, device):
    kernels(form)
    log_beta = random_log_beta(1, 70, 2).to(device).transpose(1, 2).requires_grad_()
    runs = []
    for inputs in (log_beta, log_beta.contiguous()):
        mass = retention_sum(inputs)
        runs.append((mass, *torch.autograd.grad(mass.sum(), log_beta)))  # an expanded gradient has strides of 0
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


@pytest.mark.parametrize("device", DEVICES)
def test_fused_is_one_graph_for_torch_compile(kernels, device):
    kernels("linear")
    log_beta = random_log_beta(1, 2, 70).to(device)
    document_ids = (torch.arange(70, device=device) // 40)[None]
    torch.library.opcheck(
        torch.ops.retention_gates.retention_sum.default,
        (log_beta.clone().requires_grad_(), document_ids, False, True),
        test_utils=("test_schema", "test_faketensor"),
    )

    def loss(x):
        return (retention_sum(x, document_ids=document_ids) - 5).clamp(min=0).mean()

    results = []
    compiled = torch.compile(loss, fullgraph=True, backend="inductor" if device == "cuda" else "aot_eager")
    for function in (loss, compiled):
        inputs = log_beta.clone().requires_grad_()
        value = function(inputs)
        results.append((value.detach(), *torch.autograd.grad(value, inputs)))
    torch.testing.assert_close(results[0], results[1], rtol=1e-6, atol=1e-9)


def test_the_form_is_chosen_by_length(kernels, monkeypatch):
    from retention_gates.kernels.retention_sum import fused

    chosen = []
    monkeypatch.setattr(fused, "forward", lambda x, *options: chosen.append(options[2]) or torch.zeros(x.shape))
    for tokens in (fused.LINEAR_FROM - 1, fused.LINEAR_FROM):
        retention_sum(torch.zeros(1, 1, tokens))
    assert chosen == [False, True]


@pytest.mark.parametrize("tokens", [1024, 16_384, 131_072])
def test_nodes_stand_for_every_rate(tokens):
    """In fp64, at full length: e^(-rate age) and what rows of one rate sum up to, from the decays of the nodes."""
    pytest.importorskip("triton")
    from retention_gates.kernels.retention_sum.fused import SETTINGS
    from retention_gates.kernels.retention_sum.nodes import nodes_for

    nodes = nodes_for(tokens, SETTINGS, torch.device("cpu"))
    nearest = SETTINGS.chunk + 1
    tiny = torch.tensor([0, 1e-9])
    rates = torch.cat(
        [tiny, torch.logspace(math.log10(1e-3 / tokens), math.log10(0.999 * nodes.greatest), 500)]
    ).double()
    ages = torch.logspace(math.log10(nearest), math.log10(tokens), 1000, dtype=torch.float64)
    place = (torch.log2(rates + nodes.offset) - nodes.lowest) * nodes.per_octave
    interval = place.clamp(0, nodes.intervals - 1).long()
    distance = (2 * (place - interval) - 1)[:, None] - torch.tensor(nodes.roots, dtype=torch.float64)
    others = ~torch.eye(nodes.order, dtype=torch.bool)
    weights = torch.where(others, distance[:, None], 1).prod(-1) * torch.tensor(nodes.scales)  # [rates, order]
    node_rates = -nodes.decay.log() / SETTINGS.chunk
    decays = torch.exp(-node_rates.view(nodes.intervals, nodes.order, 1) * ages)
    estimate = (weights[:, :, None] * decays[interval]).sum(1)
    exact = torch.exp(-rates[:, None] * ages)
    error = (estimate - exact).abs()
    assert error.max() < 2e-7

    # errors of one sign at every age: sums over all ages, against those of the exact decay
    width = ages.diff(prepend=ages[:1])
    near = torch.arange(nearest, dtype=torch.float64)
    near_decay = torch.exp(-rates[:, None] * near)
    relative = (error * width).cumsum(-1) / (near_decay.sum(-1, keepdim=True) + (exact * width).cumsum(-1))
    aged = (error * ages * width).cumsum(-1)
    aged_exact = (near_decay * near).sum(-1, keepdim=True) + (exact * ages * width).cumsum(-1)
    assert relative.max() < 1e-6
    assert (aged / aged_exact).max() < 5e-6


@pytest.mark.parametrize("device", DEVICES)
def test_fused_exact_does_not_lose_small_decays(kernels, device):
    """Terms just below 1, added to hundreds: a plain fp32 sum rounds every one of them up, and is 1e-5 off."""
    kernels("exact")
    log_beta = torch.full((1, 1, 1000), -3e-8, device=device)
    age = torch.arange(1000, device=device, dtype=torch.float64)
    expected = torch.exp(-3e-8 * age).cumsum(0)
    assert ((retention_sum(log_beta).flatten() - expected) / expected).abs().max() < 1e-6
