"""Queries and keys of some tokens turned by one Triton kernel, an operator that compilers and graphs take."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from retention_gates.kernels.checks import with_unit_stride
from retention_gates.kernels.dispatch import on_own_device


@torch.library.custom_op("retention_gates::rotary", mutates_args=())
@on_own_device
def rotary(query: Tensor, key: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """Arguments and result as in the package's `rotary`."""
    query, key, cos, sin = map(with_unit_stride, (query, key, cos, sin))
    (batch, query_heads, tokens, head_dim), heads, half = query.shape, key.shape[1], cos.shape[2] // 2
    results = _empty(query), _empty(key)
    _turn[(query_heads + heads, batch * tokens)](
        query,
        key,
        cos,
        sin,
        *results,
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


@rotary.register_fake
def _(query, key, cos, sin):
    return _empty(query), _empty(key)


def _empty(x: Tensor) -> Tensor:
    return x.new_empty(x.shape)


@triton.jit
def _turn(
    query,  # [B, HQ, T, D]
    key,  # [B, H, T, D]
    cos,  # [B, T, R]
    sin,
    turned_query,  # contiguous
    turned_key,
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
    if head < query_heads:
        source = query + batch * query_batch + head * query_head + token * query_token
        target = turned_query + ((batch * query_heads + head) * tokens + token) * D
    else:
        head -= query_heads
        source = key + batch * key_batch + head * key_head + token * key_token
        target = turned_key + ((batch * heads + head) * tokens + token) * D
    pair = tl.arange(0, PAIRS)
    mask = pair < HALF
    cosines, sines = cos + batch * cos_batch + token * cos_token, sin + batch * sin_batch + token * sin_token
    first, second = tl.load(source + pair, mask=mask), tl.load(source + HALF + pair, mask=mask)
    tl.store(target + pair, _sum(first, cosines + pair, -second, sines + pair, mask), mask=mask)
    there = HALF + pair
    tl.store(target + there, _sum(second, cosines + there, first, sines + there, mask), mask=mask)
    if REST > 0:
        rest = 2 * HALF + tl.arange(0, REST)
        tl.store(target + rest, tl.load(source + rest, mask=rest < D), mask=rest < D)


@triton.jit
def _sum(one, its_factors, other, other_factors, mask):
    """Two products and their sum, rounded after each, in the dtype of the factors."""
    dtype: tl.constexpr = one.dtype
    left = (one.to(tl.float32) * tl.load(its_factors, mask=mask).to(tl.float32)).to(dtype)
    right = (other.to(tl.float32) * tl.load(other_factors, mask=mask).to(tl.float32)).to(dtype)
    return (left.to(tl.float32) + right.to(tl.float32)).to(dtype)
