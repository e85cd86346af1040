"""A program per row as one Triton kernel, an operator that compilers and graphs take."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from retention_gates.kernels.checks import with_unit_stride
from retention_gates.kernels.dispatch import on_own_device

NUMBERS_PER_WARP = 512
MOST_WARPS = 16


@torch.library.custom_op("retention_gates::rms_norm", mutates_args=())
@on_own_device
def rms_norm(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    """Arguments and result as in the package's `rms_norm`."""
    rows, weight = with_unit_stride(x.reshape(-1, x.shape[-1])), weight.contiguous()
    output, block = _empty(x), triton.next_power_of_2(rows.shape[1])
    _norm[(len(rows),)](
        rows,
        weight,
        output,
        rows.stride(0),
        epsilon,
        C=rows.shape[1],
        BLOCK=block,
        num_warps=min(MOST_WARPS, max(1, block // NUMBERS_PER_WARP)),
    )
    return output


@rms_norm.register_fake
def _(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    return _empty(x)


def _empty(x: Tensor) -> Tensor:
    return x.new_empty(x.shape)


@triton.jit
def _norm(
    x,  # [R, C]
    weight,  # [C]
    output,  # [R, C], contiguous
    stride,
    epsilon,
    C: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row, column = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK)
    mask = column < C
    values = tl.load(x + row * stride + column, mask=mask, other=0.0).to(tl.float32)
    factors = tl.load(weight + column, mask=mask, other=0.0).to(tl.float32)
    result = values * tl.math.rsqrt(tl.sum(values * values) / C + epsilon) * factors
    tl.store(output + row * C + column, result.to(output.dtype.element_ty), mask=mask)
