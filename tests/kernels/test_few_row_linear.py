"""Linear layers of a few rows: the naive form, the kernel in the interpreter and on a GPU, and what is refused."""

import pytest
import torch
from torch import Tensor

from retention_gates.kernels.few_row_linear import MOST_ROWS, few_row_linear

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
    assert_right(few_row_linear(x, weights, biases), x, weights, biases)


@pytest.mark.parametrize("kernels", ["naive", "fused"])
@pytest.mark.parametrize("wide", [None, 0, 2, 4])
def test_dtypes_in_any_order(monkeypatch, kernels, wide):
    monkeypatch.setenv("RETENTION_GATES_KERNELS", kernels)
    x, weights, biases = inputs((5,), 72, (24, 16, 40, 8, 33), torch.float16, wide=wide)
    weights[1] = weights[1].float()
    biases[1] = torch.ones(16)
    assert_right(few_row_linear(x, weights, biases), x, weights, biases)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("wide", [0, 1, None])
@pytest.mark.parametrize(
    "shape", [*SHAPES, ((4, 1), 2560, (512, 4096, 1024, 1024)), ((32, 1), 9728, (2560,)), ((8,), 576, (49_152,))]
)
def test_against_fp64_on_a_gpu(monkeypatch, shape, wide, dtype):
    monkeypatch.setenv("RETENTION_GATES_KERNELS", "fused")
    x, weights, biases = inputs(*shape, dtype, "cuda", wide)
    first = few_row_linear(x, weights, biases)
    assert_right(first, x, weights, biases)
    for one, other in zip(first, few_row_linear(x, weights, biases), strict=True):
        assert torch.equal(one, other)


def test_rows_apart_in_memory(monkeypatch):
    monkeypatch.setenv("RETENTION_GATES_KERNELS", "fused")
    x, weights, biases = inputs((3,), 64, (16, 8), torch.float16)
    wide = torch.zeros(3, 200, dtype=x.dtype)
    wide[:, 10:74] = x
    together = torch.cat([weights[1], weights[1]], dim=1)[:, :64]  # rows of a larger matrix
    apart = few_row_linear(wide[:, 10:74], [weights[0], together], biases)
    for one, other in zip(apart, few_row_linear(x, weights, biases), strict=True):
        assert torch.equal(one, other)


def test_one_operator_in_a_compiled_function(monkeypatch):
    monkeypatch.setenv("RETENTION_GATES_KERNELS", "fused")
    x, weights, biases = inputs((2, 1), 64, (16, 8), torch.float16)
    compiled = torch.compile(few_row_linear, fullgraph=True, backend="aot_eager")
    for one, other in zip(compiled(x, weights, biases), few_row_linear(x, weights, biases), strict=True):
        assert torch.equal(one, other)


def test_bad_input():
    x, weights, biases = inputs((2, 1), 64, (16, 8), torch.bfloat16)
    with pytest.raises(ValueError, match="x is torch.float32"):
        few_row_linear(x.float(), weights, biases)
    with pytest.raises(ValueError, match=f"{MOST_ROWS + 1} rows"):
        few_row_linear(x[0].expand(MOST_ROWS + 1, -1), weights, biases)
    with pytest.raises(ValueError, match="2 weights and 1 biases"):
        few_row_linear(x, weights, biases[:1])
    with pytest.raises(ValueError, match=r"weights\[1\] must have shape"):
        few_row_linear(x, [weights[0], weights[1][:, :32]], biases)
    with pytest.raises(ValueError, match=r"weights\[0\] is torch.float16"):
        few_row_linear(x, [weights[0].half(), weights[1]], [None, None])
    with pytest.raises(ValueError, match=r"biases\[0\] is torch.bfloat16"):
        few_row_linear(x, weights, [biases[0].bfloat16(), None])
    with pytest.raises(ValueError, match="rows must be contiguous"):
        few_row_linear(x, [weights[0].T.contiguous().T, weights[1]], biases)
