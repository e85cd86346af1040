"""The norm of rows in 16 bits: both forms against fp64, and what is refused."""

import pytest
import torch

from retention_gates.kernels.rms_norm import LARGEST_WIDTH, rms_norm

SHAPES = [(1, 16), (4, 1, 576), (2, 1, 8, 128), (3, 2560), (33, 100)]


def inputs(shape, dtype, device="cpu"):
    generator = torch.Generator().manual_seed(shape[-1])
    x, weight = torch.randn(shape, generator=generator) * 3, 1 + torch.randn(shape[-1], generator=generator) / 4
    return x.to(device, dtype), weight.to(device, dtype)


def assert_right(x, weight, epsilon=1e-5):
    output = rms_norm(x, weight, epsilon)
    wide = x.double()
    exact = wide / (wide.square().mean(-1, keepdim=True) + epsilon).sqrt() * weight.double()
    assert output.dtype == x.dtype and output.shape == x.shape
    assert ((output.double() - exact).abs() <= 0.51 * torch.finfo(x.dtype).eps * exact.abs() + 1e-7).all()


@pytest.mark.parametrize("kernels, dtype", [("naive", torch.bfloat16), ("fused", torch.float16)])
@pytest.mark.parametrize("shape", SHAPES)
def test_against_fp64(monkeypatch, shape, kernels, dtype):
    monkeypatch.setenv("RETENTION_GATES_KERNELS", kernels)
    assert_right(*inputs(shape, dtype))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("shape", [*SHAPES, (4, 1, 32, 128), (32, LARGEST_WIDTH)])
def test_against_fp64_on_a_gpu(monkeypatch, shape, dtype):
    monkeypatch.setenv("RETENTION_GATES_KERNELS", "fused")
    assert_right(*inputs(shape, dtype, "cuda"))


def test_rows_apart_in_memory(monkeypatch):
    monkeypatch.setenv("RETENTION_GATES_KERNELS", "fused")
    x, weight = inputs((3, 64), torch.float16)
    wide = torch.zeros(3, 200, dtype=x.dtype)
    wide[:, 10:74] = x
    assert torch.equal(rms_norm(wide[:, 10:74], weight, 1e-6), rms_norm(x, weight, 1e-6))


def test_one_operator_in_a_compiled_function(monkeypatch):
    monkeypatch.setenv("RETENTION_GATES_KERNELS", "fused")
    x, weight = inputs((2, 64), torch.float16)
    compiled = torch.compile(rms_norm, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x, weight, 1e-6), rms_norm(x, weight, 1e-6))


def test_bad_input():
    x, weight = inputs((2, 64), torch.bfloat16)
    with pytest.raises(ValueError, match="of torch.float32"):
        rms_norm(x.float(), weight, 1e-6)
    with pytest.raises(ValueError, match=f"1 to {LARGEST_WIDTH}"):
        rms_norm(x[:1, :1].expand(1, LARGEST_WIDTH + 1), weight, 1e-6)
    with pytest.raises(ValueError, match="weight must have shape"):
        rms_norm(x, weight[:8], 1e-6)
    with pytest.raises(ValueError, match="weight is torch.float16"):
        rms_norm(x, weight.half(), 1e-6)
