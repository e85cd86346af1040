"""The fused retention attention: in Triton's interpreter at small sizes, compiled on a GPU at those of models."""

import os

import pytest
import torch
import torch.nn.functional as F
from attention_cases import eager_attention, in_fp64, make_eviction_times, make_inputs, output_and_gradients
from torch.utils.checkpoint import checkpoint

from retention_gates.kernels.dispatch import VARIABLE
from retention_gates.kernels.retention_attention import naive, retention_attention

pytest.importorskip("triton")
from retention_gates.kernels.retention_attention import fused

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
interpreted = pytest.mark.skipif(not INTERPRETED, reason="needs Triton's interpreter")
FEW = 64  # numbers, below which a norm is luck too
# weights of hidden pairs, which the kernels drop after the exponential
pytestmark = pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning")


@pytest.fixture(autouse=True)
def fused_on_nan(monkeypatch):
    """The fused form on every device, and NaN in what it allocates, so that what no kernel writes shows."""
    monkeypatch.setenv(VARIABLE, "fused")

    def filled(allocate):
        def allocate_filled(*arguments, **options):
            result = allocate(*arguments, **options)
            return result.fill_(float("nan")) if result.is_floating_point() else result

        return allocate_filled

    monkeypatch.setattr(torch, "empty_like", filled(torch.empty_like))
    monkeypatch.setattr(torch.Tensor, "new_empty", filled(torch.Tensor.new_empty))


def documents(kind, tokens):
    """int64 [B, T] of documents of different lengths, padding around them, or padding inside them."""
    a, b = tokens // 3, tokens // 2
    index = torch.arange(tokens)
    packed = (index >= a).long() + (index >= b).long() + (index >= b + 1).long()  # the third of one token
    if kind == "packed":
        return torch.stack([packed, torch.zeros_like(packed)])
    if kind == "padded":
        empty = torch.full_like(packed, -1)
        return torch.stack([torch.where(index < a, -1, 0), torch.where(index < b + a, packed, -1), empty])
    assert kind == "holes"
    hole = (index >= a // 2) & (index < a // 2 + 2) | (index > b + a // 2) & (index < b + a // 2 + tokens // 4)
    return torch.where(hole, -1, packed)[None]


def make_case(tokens, head_dim=16, value_dim=None, heads=1, group=1, dtype=torch.float32, device="cpu", **case):
    """Inputs and options of the op. Of `case`, `documents` is a kind, `evicted` and `sinks` are flags."""
    ids = documents(case.pop("documents"), tokens).to(device) if "documents" in case else None
    batch = 1 if ids is None else len(ids)
    shape = (batch, heads, group, tokens, head_dim, value_dim or head_dim)
    inputs = make_inputs(*shape, dtype=dtype, device=device, sinks=case.pop("sinks", False))
    options = {"scale": head_dim**-0.5, "document_ids": ids}
    if case.pop("evicted", False):
        options["eviction_times"] = make_eviction_times(batch, heads, tokens, device)
    return inputs, options | case


def check_against_fp64(inputs, options):
    """Every result's error, as a norm, beside that of eager attention in the same dtype.

    Norms, because the largest error of single numbers is luck. Where a gradient's terms cancel, as all do in a row
    that sees one key only, some roundings of fp32 are left, which may happen to be none in the other form. Of a few
    numbers the last rounding, to the dtype of the inputs, is luck as well: half a unit is left to it.
    """
    expected = output_and_gradients(naive.retention_attention, in_fp64(inputs), **options)
    plain = output_and_gradients(eager_attention, inputs, **options)
    ours = output_and_gradients(retention_attention, inputs, **options)
    for name, exact in expected.items():
        assert ours[name].dtype == plain[name].dtype and ours[name].shape == exact.shape, name
        error, plain_error = ((form[name].double() - exact).norm() for form in (ours, plain))
        rounding = 8 * torch.finfo(torch.float32).eps * (exact.norm() + exact.numel() ** 0.5)
        if exact.numel() < FEW:
            rounding += torch.finfo(ours[name].dtype).eps / 2 * exact.norm()
        assert error <= 2 * plain_error + rounding, f"{name}: {error:.3g}, eager {plain_error:.3g}"
    return ours


HALF = {"dtype": torch.float16}
EVICTED = {"evicted": True, "heads": 2, "group": 2}
INTERPRETER_CASES = {
    "one token": dict(tokens=1, group=3),
    "one token, half": dict(tokens=1, group=3, sinks=True, **HALF),
    "odd": dict(tokens=37, heads=2, group=3, value_dim=24),
    "127": dict(tokens=127, head_dim=64, value_dim=32, **HALF),
    "128": dict(tokens=128, group=4, **HALF),
    "129": dict(tokens=129, group=3, **HALF),
    "131": dict(tokens=131, softcap=3.0, sinks=True),
    "wide": dict(tokens=67, head_dim=80, value_dim=64),
    "softcap, half": dict(tokens=70, softcap=3.0, sinks=True, group=2, **HALF),
    "packed": dict(tokens=131, documents="packed"),
    "packed, half": dict(tokens=131, documents="packed", softcap=3.0, **HALF),
    "padded": dict(tokens=45, documents="padded", group=2, sinks=True),
    "padded, half": dict(tokens=131, documents="padded", **HALF),
    "holes": dict(tokens=101, documents="holes", heads=2),
    "window of 1": dict(tokens=35, sliding_window=1),
    "window of 37": dict(tokens=131, sliding_window=37),
    "window of 37, half": dict(tokens=200, sliding_window=37, documents="packed", **HALF),
    "window beyond T": dict(tokens=35, sliding_window=36),
    "evicted": dict(tokens=101, **EVICTED),
    "evicted, half": dict(tokens=150, sinks=True, softcap=5.0, **EVICTED, **HALF),
    "evicted, packed, window": dict(tokens=50, documents="packed", sliding_window=20, **EVICTED),
    "evicted, padded": dict(tokens=45, documents="padded", sinks=True, **EVICTED),
    "gaussian": dict(tokens=131, heads=2, group=2, gaussian=True),
    "gaussian, half": dict(tokens=200, documents="packed", softcap=3.0, gaussian=True, **HALF),
    "gaussian, padded": dict(tokens=131, documents="padded", sinks=True, gaussian=True),
    "gaussian, evicted": dict(tokens=101, gaussian=True, **EVICTED),
}


@interpreted
@pytest.mark.parametrize("case", INTERPRETER_CASES)
def test_error_is_at_most_twice_eager_attentions(case):
    check_against_fp64(*make_case(**INTERPRETER_CASES[case]))


GPU_CASES = {
    "one token": dict(tokens=1),
    "odd": dict(tokens=37, heads=3),
    "127": dict(tokens=127, group=16),
    "128": dict(tokens=128, group=3),
    "129": dict(tokens=129),
    "1,100": dict(tokens=1100, heads=2, group=4),
    "softcap, sinks": dict(tokens=517, group=4, softcap=5.0, sinks=True),
    "packed": dict(tokens=1100, documents="packed", group=4),
    "padded": dict(tokens=517, documents="padded", heads=2, sinks=True),
    "holes": dict(tokens=1024, documents="holes", group=2),
    "window": dict(tokens=1100, sliding_window=129, group=2),
    "window, packed": dict(tokens=700, sliding_window=64, documents="packed", softcap=5.0),
    "evicted": dict(tokens=1100, **EVICTED),
    "evicted, packed, window": dict(tokens=700, documents="packed", sliding_window=100, **EVICTED),
    "evicted, padded": dict(tokens=517, documents="padded", sinks=True, softcap=5.0, **EVICTED),
    "gaussian": dict(tokens=1100, heads=2, group=4, gaussian=True),
    "gaussian, packed": dict(tokens=700, documents="packed", softcap=5.0, sinks=True, gaussian=True),
}
HEAD_DIMS = [(16, 16), (64, 64), (80, 80), (96, 96), (128, 128), (256, 256), (64, 128), (192, 128)]
# Each one compiles its kernels, so that dims and cases are not crossed.
GPU_RUNS = [(torch.bfloat16, (64, 64), case) for case in GPU_CASES]
GPU_RUNS += [(torch.float16, (128, 128), case) for case in GPU_CASES]
GPU_RUNS += [(torch.bfloat16, dims, "packed") for dims in HEAD_DIMS if dims != (64, 64)]
GPU_RUNS += [(torch.float16, dims, "1,100") for dims in HEAD_DIMS if dims != (128, 128)]
GPU_RUNS += [(torch.float32, dims, "window, packed") for dims in HEAD_DIMS]


@pytest.mark.gpu
@pytest.mark.parametrize(("dtype", "dims", "case"), GPU_RUNS, ids=str)
def test_error_at_sizes_of_models(dtype, dims, case):
    sizes = dict(zip(("head_dim", "value_dim"), dims, strict=True))
    check_against_fp64(*make_case(**sizes, dtype=dtype, device="cuda", **GPU_CASES[case]))


def on_both(test):
    """Runs a test twice: in the interpreter by default, and compiled where a GPU is asked for."""
    return pytest.mark.parametrize(
        "device", [pytest.param("cpu", marks=interpreted), pytest.param("cuda", marks=pytest.mark.gpu)]
    )(test)


@on_both
@pytest.mark.parametrize("case", [{"documents": "packed"}, {"evicted": True, "sinks": True, "group": 3}])
def test_two_runs_are_bit_equal(device, case):
    inputs, options = make_case(45 if device == "cpu" else 1100, device=device, **case)
    first, second = (output_and_gradients(retention_attention, inputs, **options) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


@on_both
def test_log_beta_of_zero_is_plain_attention(device):
    inputs, options = make_case(70, group=3, device=device)
    inputs["log_beta"] = torch.zeros_like(inputs["log_beta"])
    output = retention_attention(**inputs, **options)
    query, key, value, _ = inputs.values()
    plain = F.scaled_dot_product_attention(query, key, value, is_causal=True, scale=options["scale"], enable_gqa=True)
    torch.testing.assert_close(output, plain)


@on_both
@pytest.mark.parametrize("lowest", [-1e-9, -40.0, -1e30, torch.finfo(torch.float32).min])
def test_extreme_log_beta(device, lowest):
    """Tokens that fade at once but see themselves, between tokens that never fade."""
    inputs, options = make_case(70, device=device)
    with torch.no_grad():
        inputs["log_beta"].zero_()[..., 1::3] = lowest
    ours = check_against_fp64(inputs, options)
    if lowest < -1e3:
        # gone after one step, beyond what fp32 holds: a change of log_beta changes nothing; offset and distance of the
        # block cancel up to the rounding of a fused multiply-add
        assert ours["log_beta"][..., 1::3].abs().max() <= 1e-5


@on_both
@pytest.mark.parametrize("wanted", [("log_beta",), ("query",), ("value", "log_beta"), ("sinks",)])
def test_only_what_needs_a_gradient_gets_one(device, wanted):
    inputs, options = make_case(37, group=2, sinks=True, device=device)
    whole = output_and_gradients(retention_attention, inputs, **options)
    some = {name: tensor.detach().requires_grad_(name in wanted) for name, tensor in inputs.items()}
    result = output_and_gradients(retention_attention, some, **options)
    assert set(result) == {"output", *wanted}
    for name, tensor in result.items():
        assert tensor.any(), name
        torch.testing.assert_close(tensor, whole[name])
    with torch.no_grad():
        output = retention_attention(**inputs, **options)
    assert not output.requires_grad and torch.equal(output, whole["output"])


@on_both
@pytest.mark.parametrize("kind", ["padded", "holes"])
def test_padding_gives_nothing_whatever_it_holds(device, kind):
    inputs, options = make_case(45, group=2, documents=kind, device=device)
    clean = output_and_gradients(retention_attention, inputs, **options)
    padding = options["document_ids"] < 0
    with torch.no_grad():
        for name in ("query", "key", "value"):
            inputs[name].transpose(1, 2)[padding] = 1e18
        inputs["log_beta"].transpose(1, 2)[padding] = 0.0
    result = output_and_gradients(retention_attention, inputs, **options)
    for name, tensor in result.items():
        assert torch.equal(tensor, clean[name]), name
        assert not tensor.transpose(1, 2)[padding].any(), name


@on_both
def test_a_row_with_nothing_but_padding_left_sees_nothing(device):
    """Token 2 never enters, token 0 is gone when it comes, and token 1 between them is padding."""
    inputs, options = make_case(4, device=device)
    options["document_ids"] = torch.tensor([[0, -1, 0, 0]], device=device)
    options["eviction_times"] = torch.tensor([[[1, 4, 0, 4]]], device=device)
    ours = check_against_fp64(inputs, options)
    assert not ours["output"][:, :, 2].any()


@on_both
def test_eviction_times_beyond_the_end_are_never(device):
    inputs, options = make_case(10, device=device)
    whole = output_and_gradients(retention_attention, inputs, **options)
    for never in (10, 2**31 - 1, 2**32, 2**63 - 1):
        options["eviction_times"] = torch.full((1, 1, 10), never, device=device)
        result = output_and_gradients(retention_attention, inputs, **options)
        for name, tensor in result.items():
            torch.testing.assert_close(tensor, whole[name], msg=lambda m, n=name: f"{n}: {m}")


@on_both
def test_tensors_laid_out_as_projections_give_them(device):
    """[B, T, H, D] in memory, key and value slices of one tensor, the gradient expanded from one number."""
    inputs, options = make_case(37, heads=2, group=2, device=device)
    query, key, value, log_beta = (tensor.detach() for tensor in inputs.values())
    fused_projection = torch.cat([key.transpose(1, 2), value.transpose(1, 2)], dim=-1)  # [B, T, H, 2 D]
    strided = {
        "query": query.transpose(1, 2).contiguous().transpose(1, 2),
        "key": fused_projection[..., :16].transpose(1, 2),
        "value": fused_projection[..., 16:].transpose(1, 2),
        "log_beta": log_beta.transpose(1, 2).contiguous().transpose(1, 2),
    }
    strided = {name: tensor.requires_grad_() for name, tensor in strided.items()}
    assert not any(tensor.is_contiguous() for tensor in strided.values())
    results = []
    for case in (inputs, strided):
        output = retention_attention(**case, **options)
        results.append((output, *torch.autograd.grad(output.sum(), list(case.values()))))
    assert all(torch.equal(*pair) for pair in zip(*results, strict=True))


@on_both
def test_inside_a_checkpointed_layer(device):
    inputs, options = make_case(37, device=device)
    expected = output_and_gradients(retention_attention, inputs, **options)

    def layer(**tensors):
        return checkpoint(lambda: retention_attention(**tensors, **options), use_reentrant=False)

    actual = output_and_gradients(layer, inputs)
    assert all(torch.equal(actual[name], expected[name]) for name in expected)


@pytest.mark.parametrize(
    ("device", "backend"),
    [
        pytest.param("cpu", "aot_eager", marks=interpreted),
        pytest.param("cuda", "inductor", marks=pytest.mark.gpu),
    ],
)
def test_compiles_into_one_graph(device, backend):
    inputs, options = make_case(20, documents="packed", device=device)

    def step(**tensors):
        tensors["query"] = 2 * tensors["query"]
        return 3 * retention_attention(**tensors, **options)

    expected = output_and_gradients(step, inputs)
    actual = output_and_gradients(torch.compile(step, fullgraph=True, backend=backend), inputs)
    assert all(torch.equal(actual[name], expected[name]) for name in expected)


@on_both
def test_registered_op_is_sound(device):
    inputs, options = make_case(9, group=2, sinks=True, device=device)
    first, last = fused.visible_spans(None, 4, (1, 9), torch.device(device))
    for gaussian in (False, True):
        arguments = (*inputs.values(), first, last, None, options["scale"], None, gaussian)
        torch.library.opcheck(fused._forward, arguments)


@on_both
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"query": (4, 257, 264), "key": (2, 257, 264)}, "query has head dim 257; the fused kernel takes up to 256"),
        ({"value": (2, 264, 264)}, "value has head dim 264"),
        ({"value": (2, 6, 8)}, "value has head dim 6; the fused kernel takes multiples of 4"),
        ({"key": (2, 16, 18)}, r"key has strides \(252, 126, 18, 1\)"),
    ],
)
def test_layouts_that_the_kernels_cannot_read(device, change, message):
    sizes = {"query": (4, 16, 16), "key": (2, 16, 16), "value": (2, 16, 16)} | change
    arguments = {
        name: torch.zeros(2, heads, 7, stride, device=device)[..., :dim]
        for name, (heads, dim, stride) in sizes.items()
    }
    with pytest.raises(ValueError, match=message):
        retention_attention(**arguments, log_beta=torch.zeros(2, 2, 7, device=device), scale=1.0)


@on_both
@pytest.mark.parametrize(
    ("view", "message"),
    [
        (lambda x: x.double(), "query is torch.float64; the fused kernel takes"),
        (lambda x: x[:, :1].expand(-1, 4, -1, -1), r"query has strides \(.*\); the fused kernel needs"),
        (lambda x: x.mT.contiguous().mT, r"query has strides \(.*\); the fused kernel needs"),
        (lambda x: F.pad(x, (1, 3))[..., 1:17], r"query has strides \(.*\); the fused kernel needs"),
    ],
    ids=["fp64", "expanded", "transposed", "address"],
)
def test_queries_that_the_kernels_cannot_read(device, view, message):
    query = view(torch.zeros(2, 4, 7, 16, device=device))
    other = torch.zeros(2, 4, 7, 16, device=device, dtype=query.dtype)
    with pytest.raises(ValueError, match=message):
        retention_attention(query, other, other, torch.zeros(2, 4, 7, device=device), scale=1.0)
