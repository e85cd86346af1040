"""Rotary position embedding: both forms against one another and against complex numbers, and what is refused."""

import pytest
import torch

from retention_gates.kernels.rotary import naive, rotary


def inputs(batch, query_heads, heads, tokens, head_dim, rotated, dtype, device="cpu"):
    generator = torch.Generator().manual_seed(head_dim)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator).to(device, dtype)

    query, key = random(batch, tokens, query_heads, head_dim), random(batch, tokens, heads, head_dim)
    angles = torch.rand(1, tokens, rotated // 2, generator=generator).repeat(1, 1, 2).expand(batch, -1, -1) * 7
    return query.transpose(1, 2), key.transpose(1, 2), angles.cos().to(device, dtype), angles.sin().to(device, dtype)


SHAPES = [(1, 2, 1, 1, 16, 16), (3, 6, 2, 1, 64, 64), (2, 4, 4, 5, 40, 24), (1, 3, 1, 2, 96, 96), (2, 2, 2, 3, 32, 2)]
DTYPES = [torch.float16, torch.bfloat16, torch.float32]


@pytest.mark.parametrize("shape", SHAPES)
def test_rotates_pairs_by_their_angle(monkeypatch, shape):
    monkeypatch.setenv("RETENTION_GATES_KERNELS", "naive")
    query, key, cos, sin = inputs(*shape, torch.float64)
    half = shape[-1] // 2
    rotations = torch.complex(cos[..., :half], sin[..., :half])[:, None]
    for x, rotated in zip((query, key), rotary(query, key, cos, sin), strict=True):
        pairs = torch.complex(x[..., :half], x[..., half : 2 * half]) * rotations
        expected = torch.cat([pairs.real, pairs.imag, x[..., 2 * half :]], dim=-1)
        torch.testing.assert_close(rotated, expected)


@pytest.mark.parametrize(
    "device, dtype",
    [
        ("cpu", torch.float16),
        ("cpu", torch.float32),  # Triton's interpreter cuts numbers off that bfloat16 would round
        *(pytest.param("cuda", dtype, marks=pytest.mark.gpu) for dtype in DTYPES),
    ],
)
@pytest.mark.parametrize("shape", [*SHAPES, (4, 32, 8, 1, 128, 128)])
def test_the_kernel_rounds_as_torch_does(monkeypatch, shape, device, dtype):
    monkeypatch.setenv("RETENTION_GATES_KERNELS", "fused")
    given = inputs(*shape, dtype, device)
    for fused, plain in zip(rotary(*given), naive.rotary(*given), strict=True):
        assert fused.dtype == dtype
        assert torch.equal(fused, plain) if dtype != torch.float32 else torch.allclose(fused, plain, atol=1e-6)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("normed", ["query key", "query", "key"])
@pytest.mark.parametrize("shape", [*SHAPES, (4, 32, 8, 1, 128, 128)])
def test_a_norm_before(monkeypatch, shape, normed, device):
    """As norms of their own, up to a rounding where a number is between two."""
    monkeypatch.setenv("RETENTION_GATES_KERNELS", "fused")
    given = inputs(*shape, torch.float16, device)
    weights = (1 + torch.randn(2, shape[4], generator=torch.Generator().manual_seed(0)) / 4).to(device, torch.float16)
    norms = {
        f"{name}_norm": (weight, 1e-5)
        for name, weight in zip(("query", "key"), weights, strict=True)
        if name in normed
    }
    for fused, plain in zip(rotary(*given, **norms), naive.rotary(*given, **norms), strict=True):
        torch.testing.assert_close(fused, plain, rtol=2e-3, atol=2e-3)
        assert (fused == plain).float().mean() > 0.95


def test_one_operator_in_a_compiled_function(monkeypatch):
    monkeypatch.setenv("RETENTION_GATES_KERNELS", "fused")
    given = inputs(*SHAPES[1], torch.float16)
    compiled = torch.compile(rotary, fullgraph=True, backend="aot_eager")
    for one, other in zip(compiled(*given), rotary(*given), strict=True):
        assert torch.equal(one, other)


def test_bad_input():
    query, key, cos, sin = inputs(2, 4, 2, 1, 16, 16, torch.float32)
    with pytest.raises(ValueError, match="alike but for their heads"):
        rotary(query, key[..., :8], cos, sin)
    with pytest.raises(ValueError, match=r"cos must have shape \[B, T, R\]"):
        rotary(query, key, cos[:1], sin[:1])
    with pytest.raises(ValueError, match=r"sin must have shape \[B, T, R\]"):
        rotary(query, key, cos, torch.cat([sin, sin], dim=-1))
    with pytest.raises(ValueError, match="must have one shape"):
        rotary(query, key, cos, sin[..., :8])
    with pytest.raises(ValueError, match=r"query_norm's weight must have shape \[D\] = \[16\]"):
        rotary(query, key, cos, sin, query_norm=(torch.ones(8), 1e-6))
    with pytest.raises(ValueError, match="key_norm's weight is torch.float16"):
        rotary(query, key, cos, sin, key_norm=(torch.ones(16).half(), 1e-6))
    with pytest.raises(ValueError, match="key is torch.float16"):
        rotary(query, key.half(), cos, sin)
