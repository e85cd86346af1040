"""Queries and keys of some tokens rotated by one Triton kernel, an operator that compilers and graphs take."""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from retention_gates.kernels.checks import with_unit_stride
from retention_gates.kernels.dispatch import on_own_device

Norm = tuple[Tensor, float]  # weight and epsilon
NO_NORM = (None, 0.0)


def rotary(
    query: Tensor,
    key: Tensor,
    cos: Tensor,
    sin: Tensor,
    *,
    query_norm: Norm | None = None,
    key_norm: Norm | None = None,
) -> tuple[Tensor, Tensor]:
    """Arguments and result as in the package's `rotary`."""
    return _rotary(query, key, cos, sin, *(query_norm or NO_NORM), *(key_norm or NO_NORM))


@torch.library.custom_op("retention_gates::rotary", mutates_args=())
@on_own_device
def _rotary(
    query: Tensor,
    key: Tensor,
    cos: Tensor,
    sin: Tensor,
    query_norm: Tensor | None,
    query_epsilon: float,
    key_norm: Tensor | None,
    key_epsilon: float,
) -> tuple[Tensor, Tensor]:
    query, key, cos, sin = map(with_unit_stride, (query, key, cos, sin))
    (batch, query_heads, tokens, head_dim), heads, half = query.shape, key.shape[1], cos.shape[2] // 2
    results = _empty(query), _empty(key)
    query_norm, key_norm = (None if norm is None else norm.contiguous() for norm in (query_norm, key_norm))
    _rotate[(query_heads + heads, batch * tokens)](
        query,
        key,
        cos,
        sin,
        *results,
        query_norm,
        key_norm,
        query_epsilon,
        key_epsilon,
        query_heads,
        heads,
        tokens,
        *query.stride()[:3],
        *key.stride()[:3],
        *cos.stride()[:2],
        *sin.stride()[:2],
        D=head_dim,
        HALF=half,
        PAIRS=triton.next_power_of_2(half),
        REST=triton.next_power_of_2(head_dim - 2 * half) if head_dim > 2 * half else 0,
        num_warps=1,
        # a product and a sum in one would round once where torch rounds twice
        **({"enable_fp_fusion": False} if query.device.type == "cuda" else {}),
    )
    return results


@_rotary.register_fake
def _(query: Tensor, key: Tensor, *others: Any) -> tuple[Tensor, Tensor]:
    return _empty(query), _empty(key)


def _empty(x: Tensor) -> Tensor:
    return x.new_empty(x.shape)


@triton.jit
def _rotate(
    query,  # [B, HQ, T, D]
    key,  # [B, H, T, D]
    cos,  # [B, T, R]
    sin,
    rotated_query,  # contiguous
    rotated_key,
    query_norm,  # [D], or None
    key_norm,
    query_epsilon,
    key_epsilon,
    query_heads,
    heads,
    tokens,
    query_batch,  # strides
    query_head,
    query_token,
    key_batch,
    key_head,
    key_token,
    cos_batch,
    cos_token,
    sin_batch,
    sin_token,
    D: tl.constexpr,
    HALF: tl.constexpr,  # R / 2
    PAIRS: tl.constexpr,  # at least HALF
    REST: tl.constexpr,  # at least D - R
):
    head, row = tl.program_id(0), tl.program_id(1).to(tl.int64)
    batch, token = row // tokens, row % tokens
    pair, rest = tl.arange(0, PAIRS), 2 * HALF + tl.arange(0, REST if REST > 0 else 1)
    cosines, sines = cos + batch * cos_batch + token * cos_token, sin + batch * sin_batch + token * sin_token
    if head < query_heads:
        source = query + batch * query_batch + head * query_head + token * query_token
        target = rotated_query + ((batch * query_heads + head) * tokens + token) * D
        _rotate_one(source, target, cosines, sines, query_norm, query_epsilon, pair, rest, D, HALF, REST)
    else:
        head -= query_heads
        source = key + batch * key_batch + head * key_head + token * key_token
        target = rotated_key + ((batch * heads + head) * tokens + token) * D
        _rotate_one(source, target, cosines, sines, key_norm, key_epsilon, pair, rest, D, HALF, REST)


@triton.jit
def _rotate_one(
    source, target, cosines, sines, norm, epsilon, pair, rest, D: tl.constexpr, HALF: tl.constexpr, REST: tl.constexpr
):  # fmt: skip
    mask, there = pair < HALF, HALF + pair
    first, second = tl.load(source + pair, mask=mask, other=0.0), tl.load(source + there, mask=mask, other=0.0)
    if REST > 0:
        others = tl.load(source + rest, mask=rest < D, other=0.0)
    if norm is not None:
        squares = tl.sum(_square(first) + _square(second))
        if REST > 0:
            squares += tl.sum(_square(others))
        scale = tl.math.rsqrt(squares / D + epsilon)
        first = _weighed(first, scale, norm + pair, mask)
        second = _weighed(second, scale, norm + there, mask)
        if REST > 0:
            others = _weighed(others, scale, norm + rest, rest < D)
    tl.store(target + pair, _sum(first, cosines + pair, -second, sines + pair, mask), mask=mask)
    tl.store(target + there, _sum(second, cosines + there, first, sines + there, mask), mask=mask)
    if REST > 0:
        tl.store(target + rest, others, mask=rest < D)


@triton.jit
def _square(x):
    return x.to(tl.float32) * x.to(tl.float32)


@triton.jit
def _weighed(x, scale, factors, mask):
    """As rms_norm gives it, rounded to the dtype."""
    return (x.to(tl.float32) * scale * tl.load(factors, mask=mask, other=0.0).to(tl.float32)).to(x.dtype)


@triton.jit
def _sum(one, its_factors, other, other_factors, mask):
    """Two products and their sum, rounded after each, in the dtype of the factors."""
    dtype: tl.constexpr = one.dtype
    left = (one.to(tl.float32) * tl.load(its_factors, mask=mask).to(tl.float32)).to(dtype)
    right = (other.to(tl.float32) * tl.load(other_factors, mask=mask).to(tl.float32)).to(dtype)
    return (left.to(tl.float32) + right.to(tl.float32)).to(dtype)
