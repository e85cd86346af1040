"""Linear layers of a few rows: the naive form, the kernel in the interpreter and on a GPU, and what is refused."""

import pytest
import torch
from torch import Tensor

from retention_gates.kernels.small_batch_linear import MOST_ROWS, fused, naive, small_batch_linear

# rows, C, N of each weight
SHAPES = [
    ((1,), 64, (16,)),
    ((4, 1), 96, (40, 24)),
    ((2, 3), 520, (33, 17, 5)),
    ((16,), 256, (64, 16, 16, 48)),
    ((32,), 100, (20, 20, 20, 20, 20, 20)),
]


def inputs(leading, columns, sizes, dtype, device="cpu", wide=0, with_bias=True):
    """x, weights and biases; the weight `wide` in fp32."""
    generator = torch.Generator().manual_seed(columns)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    dtypes = [torch.float32 if index == wide else dtype for index in range(len(sizes))]
    x = random(*leading, columns).to(device, dtype)
    weights = [random(n, columns).to(device, each) for n, each in zip(sizes, dtypes, strict=True)]
    biases = [
        random(n).to(device, each) if with_bias and index % 2 == 0 else None
        for index, (n, each) in enumerate(zip(sizes, dtypes, strict=True))
    ]
    return x, weights, biases


def assert_right(outputs, x, weights, biases):
    for output, weight, bias in zip(outputs, weights, biases, strict=True):
        exact = x.double() @ weight.double().T + (0 if bias is None else bias.double())
        assert output.dtype == weight.dtype and output.shape == exact.shape
        size = x.double().abs() @ weight.double().abs().T + (0 if bias is None else bias.double().abs())
        # a rounding of the result, and fp32's of the sums
        allowed = torch.finfo(output.dtype).eps * exact.abs() + 8 * torch.finfo(torch.float32).eps * size
        assert ((output.double() - exact).abs() <= allowed).all()


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(
    "kernels, dtype", [("naive", torch.float16), ("naive", torch.bfloat16), ("fused", torch.float16)]
)
def test_against_fp64(monkeypatch, kernels, dtype, shape):
    monkeypatch.setenv("RETENTION_GATES_KERNELS", kernels)
    x, weights, biases = inputs(*shape, dtype)
    assert_right(small_batch_linear(x, weights, biases), x, weights, biases)


@pytest.mark.parametrize("kernels", ["naive", "fused"])
@pytest.mark.parametrize("wide", [None, 0, 2, 4])
def test_dtypes_in_any_order(monkeypatch, kernels, wide):
    monkeypatch.setenv("RETENTION_GATES_KERNELS", kernels)
    x, weights, biases = inputs((5,), 72, (24, 16, 40, 8, 33), torch.float16, wide=wide)
    weights[1] = weights[1].float()
    biases[1] = torch.ones(16)
    assert_right(small_batch_linear(x, weights, biases), x, weights, biases)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("wide", [0, 1, None])
@pytest.mark.parametrize(
    "shape", [*SHAPES, ((4, 1), 2560, (512, 4096, 1024, 1024)), ((32, 1), 9728, (2560,)), ((8,), 576, (49_152,))]
)
def test_against_fp64_on_a_gpu(monkeypatch, shape, wide, dtype):
    monkeypatch.setenv("RETENTION_GATES_KERNELS", "fused")
    x, weights, biases = inputs(*shape, dtype, "cuda", wide)
    first = small_batch_linear(x, weights, biases)
    assert_right(first, x, weights, biases)
    for one, other in zip(first, small_batch_linear(x, weights, biases), strict=True):
        assert torch.equal(one, other)


def joined(x, sizes, kind):
    """Options of one kind, for weights of these sizes and x."""
    generator = torch.Generator(x.device).manual_seed(1)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, device=x.device).to(x.dtype)

    options = {
        "silu": dict(silu=(0, len(sizes) - 1)),
        "residual": dict(residual=random(*x.shape[:-1], sizes[0])),
        "multiply": dict(multiply=True),
    }
    return {name: each for part in kind.split() for name, each in options[part].items()}


JOINED = [
    ("silu", (4, 1), 96, (40, 24), 0),
    ("silu", (2,), 520, (33, 17, 5), None),
    ("residual", (4, 1), 96, (40,), None),
    ("residual", (3,), 72, (21,), 0),
    ("multiply", (4, 1), 96, (40, 40), None),
    ("multiply", (17,), 520, (21, 21), None),
    ("residual silu", (19,), 96, (65,), None),
]


def check_joined(form, kind, leading, columns, sizes, wide, dtype, device="cpu"):
    """Within two roundings of the largest results, as the naive form in fp64 gives them."""
    x, weights, biases = inputs(leading, columns, sizes, dtype, device, wide)
    weights = [weight / columns**0.5 for weight in weights]
    options = joined(x, sizes, kind)
    if "residual" in options:
        options["residual"] = options["residual"].to(weights[0].dtype)
    outputs = form(x, weights, biases, **options)
    exact = naive.small_batch_linear(
        x.double(),
        [weight.double() for weight in weights],
        [None if bias is None else bias.double() for bias in biases],
        **{name: each.double() if isinstance(each, Tensor) else each for name, each in options.items()},
    )
    for output, expected in zip(outputs, exact, strict=True):
        assert output.shape == expected.shape
        allowed = 3 * torch.finfo(output.dtype).eps * expected.abs().max() + 1e-5 * (wide is not None)
        assert (output - expected).abs().max() <= allowed
    dtypes = [weight.dtype for weight in weights]
    assert [output.dtype for output in outputs][: len(dtypes)] == dtypes[: len(outputs)]
    for one, other in zip(outputs, form(x, weights, biases, **options), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("case", JOINED, ids=lambda case: f"{case[0]}-{case[3]}")
@pytest.mark.parametrize("form", [naive.small_batch_linear, fused.small_batch_linear], ids=["naive", "fused"])
def test_what_a_model_does_next(form, case):
    """In float16, which Triton's interpreter multiplies."""
    check_joined(form, *case, torch.float16)


TILES = [fused.tile_for(*given, False) for given in ((32, 1), (65, 2), (128, 1))]


@pytest.mark.parametrize("tile", TILES, ids=str)
def test_each_tile(monkeypatch, tile):
    assert len(set(TILES)) == 3 and tile.warps * 16 <= tile.outputs
    monkeypatch.setattr(fused, "tile_for", lambda *given: tile)
    check_joined(fused.small_batch_linear, "multiply", (17,), 520, (75, 75), None, torch.float16)
    check_joined(fused.small_batch_linear, "residual", (3,), 260, (75,), None, torch.float16)


@pytest.mark.gpu
@pytest.mark.parametrize(
    "case",
    [
        *JOINED,
        ("silu", (4, 1), 2560, (512, 4096, 1024, 1024), 0),
        ("multiply", (4, 1), 2560, (9728, 9728), None),
        ("multiply", (32,), 2560, (1000, 1000), None),
        ("residual", (4, 1), 9728, (2560,), None),
    ],
    ids=lambda case: f"{case[0]}-{case[3]}",
)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_what_a_model_does_next_on_a_gpu(case, dtype):
    check_joined(fused.small_batch_linear, *case, dtype, "cuda")


def test_rows_apart_in_memory(monkeypatch):
    monkeypatch.setenv("RETENTION_GATES_KERNELS", "fused")
    x, weights, biases = inputs((3,), 64, (16, 8), torch.float16)
    wide = torch.zeros(3, 200, dtype=x.dtype)
    wide[:, 10:74] = x
    together = torch.cat([weights[1], weights[1]], dim=1)[:, :64]  # rows of a larger matrix
    apart = small_batch_linear(wide[:, 10:74], [weights[0], together], biases)
    for one, other in zip(apart, small_batch_linear(x, weights, biases), strict=True):
        assert torch.equal(one, other)


def test_one_operator_in_a_compiled_function(monkeypatch):
    monkeypatch.setenv("RETENTION_GATES_KERNELS", "fused")
    x, weights, biases = inputs((2, 1), 64, (16, 8), torch.float16)
    compiled = torch.compile(small_batch_linear, fullgraph=True, backend="aot_eager")
    for one, other in zip(compiled(x, weights, biases), small_batch_linear(x, weights, biases), strict=True):
        assert torch.equal(one, other)


def test_bad_input():
    x, weights, biases = inputs((2, 1), 64, (16, 8), torch.bfloat16)
    with pytest.raises(ValueError, match="x is torch.float32"):
        small_batch_linear(x.float(), weights, biases)
    with pytest.raises(ValueError, match=f"{MOST_ROWS + 1} rows"):
        small_batch_linear(x[0].expand(MOST_ROWS + 1, -1), weights, biases)
    with pytest.raises(ValueError, match="2 weights and 1 biases"):
        small_batch_linear(x, weights, biases[:1])
    with pytest.raises(ValueError, match=r"weights\[1\] must have shape"):
        small_batch_linear(x, [weights[0], weights[1][:, :32]], biases)
    with pytest.raises(ValueError, match=r"weights\[0\] is torch.float16"):
        small_batch_linear(x, [weights[0].half(), weights[1]], [None, None])
    with pytest.raises(ValueError, match=r"biases\[0\] is torch.bfloat16"):
        small_batch_linear(x, weights, [biases[0].bfloat16(), None])
    with pytest.raises(ValueError, match="rows must be contiguous"):
        small_batch_linear(x, [weights[0].T.contiguous().T, weights[1]], biases)
    x, (weight, _), _ = inputs((2, 1), 64, (16, 8), torch.bfloat16, wide=None)
    with pytest.raises(ValueError, match=r"silu=\[1\] must be indices of the 1 weights"):
        small_batch_linear(x, [weight], [None], silu=[1])
    with pytest.raises(ValueError, match="residual is added to the result of one weight, not of 2"):
        small_batch_linear(x, [weight] * 2, [None] * 2, residual=x)
    with pytest.raises(ValueError, match=r"residual must have shape \[..., N_0\] = \[2, 1, 16\]"):
        small_batch_linear(x, [weight], [None], residual=x)
    with pytest.raises(ValueError, match="multiply takes two weights"):
        small_batch_linear(x, [weight], [None], multiply=True)
    with pytest.raises(ValueError, match=r"weights\[1\] must have shape"):
        small_batch_linear(x, [weight, weight[:8]], [None] * 2, multiply=True)
