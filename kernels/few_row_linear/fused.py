"""Up to four linear layers of the same few rows as one Triton kernel, an operator that compilers and graphs take."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from retention_gates.kernels.dispatch import on_own_device

MOST_TOGETHER = 4  # weights of one launch


class Tile(NamedTuple):
    """How one program works."""

    outputs: int
    columns: int  # of the weight, at a time
    warps: int
    stages: int


def tile_for(rows: int) -> Tile:
    """For so many rows. Much of the weights has to be under way at any time."""
    return Tile(32, 128, 4, 5) if rows > 16 else Tile(16, 256, 2, 4)


def few_row_linear(x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor | None]) -> list[Tensor]:
    """Arguments and result as in the package's `few_row_linear`."""
    rows = x.reshape(-1, x.shape[-1])
    outputs: list[Tensor] = []
    for first in range(0, len(weights), MOST_TOGETHER):
        together = slice(first, first + MOST_TOGETHER)
        outputs += _few_row_linear(rows, list(weights[together]), list(biases[together]))
    return [output.view(*x.shape[:-1], output.shape[1]) for output in outputs]


@torch.library.custom_op("retention_gates::few_row_linear", mutates_args=())
@on_own_device
def _few_row_linear(x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor | None]) -> list[Tensor]:
    x = x if x.stride(1) == 1 else x.contiguous()
    count, (rows, columns) = len(weights), x.shape
    outputs = _empty(x, weights)
    tile = tile_for(rows)
    blocks = [triton.cdiv(len(weight), tile.outputs) for weight in weights]
    ends = [sum(blocks[: index + 1]) for index in range(count)]
    none = [None] * (MOST_TOGETHER - count)
    ends += ends[-1:] * len(none)
    _linears[(ends[-1],)](
        x,
        *(*weights, *none),
        *(*biases, *none),
        *(*outputs, *none),
        *(0 if weight is None else weight.shape[0] for weight in (*weights, *none)),
        *(0 if weight is None else weight.stride(0) for weight in (*weights, *none)),
        *ends[:-1],
        rows,
        columns,
        x.stride(0),
        COUNT=count,
        BM=max(16, triton.next_power_of_2(rows)),
        BN=tile.outputs,
        BK=tile.columns,
        STAGES=tile.stages,
        EVEN=columns % tile.columns == 0,
        num_warps=tile.warps,
    )
    return outputs


@_few_row_linear.register_fake
def _(x, weights, biases):
    return _empty(x, weights)


def _empty(x: Tensor, weights: Sequence[Tensor]) -> list[Tensor]:
    return [x.new_empty(len(x), len(weight), dtype=weight.dtype) for weight in weights]


@triton.jit
def _linears(
    x,  # [rows, C]
    weight_0,  # [N_0, C]
    weight_1,
    weight_2,
    weight_3,
    bias_0,  # [N_0]
    bias_1,
    bias_2,
    bias_3,
    output_0,  # [rows, N_0]
    output_1,
    output_2,
    output_3,
    size_0,  # N_0
    size_1,
    size_2,
    size_3,
    stride_0,
    stride_1,
    stride_2,
    stride_3,
    end_0,  # the first program that works at the next weight
    end_1,
    end_2,
    rows,
    columns,
    x_stride,
    COUNT: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    STAGES: tl.constexpr,
    EVEN: tl.constexpr,
):
    program = tl.program_id(0)
    if (COUNT == 1) | (program < end_0):
        _linear(
            x, weight_0, bias_0, output_0, size_0, stride_0, program, rows, columns, x_stride, BM, BN, BK, STAGES, EVEN
        )
    elif (COUNT == 2) | (program < end_1):
        if COUNT >= 2:
            _linear(
                x,
                weight_1,
                bias_1,
                output_1,
                size_1,
                stride_1,
                program - end_0,
                rows,
                columns,
                x_stride,
                BM,
                BN,
                BK,
                STAGES,
                EVEN,
            )
    elif (COUNT == 3) | (program < end_2):
        if COUNT >= 3:
            _linear(
                x,
                weight_2,
                bias_2,
                output_2,
                size_2,
                stride_2,
                program - end_1,
                rows,
                columns,
                x_stride,
                BM,
                BN,
                BK,
                STAGES,
                EVEN,
            )
    else:
        if COUNT >= 4:
            _linear(
                x,
                weight_3,
                bias_3,
                output_3,
                size_3,
                stride_3,
                program - end_2,
                rows,
                columns,
                x_stride,
                BM,
                BN,
                BK,
                STAGES,
                EVEN,
            )


@triton.jit
def _linear(
    x, weight, bias, output, size, stride, block, rows, columns, x_stride,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, STAGES: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    # of a weight in fp32, fewer columns at a time, because three products of it need registers, and more steps ahead
    WIDE: tl.constexpr = weight.dtype.element_ty == tl.float32
    STEP: tl.constexpr = BK // 4 if WIDE else BK
    AHEAD: tl.constexpr = 2 * STAGES - 1 if WIDE else STAGES
    row, out, column = tl.arange(0, BM), block * BN + tl.arange(0, BN), tl.arange(0, STEP)
    x_rows = x + row[:, None] * x_stride
    weight_rows = weight + out[:, None].to(tl.int64) * stride
    total = tl.zeros([BM, BN], tl.float32)
    for start in tl.range(0, columns, STEP, num_stages=AHEAD):
        at = start + column[None, :]
        weight_mask, x_mask = (out < size)[:, None], (row < rows)[:, None]
        if not EVEN:
            weight_mask, x_mask = weight_mask & (at < columns), x_mask & (at < columns)
        weights = tl.load(weight_rows + at, mask=weight_mask, other=0.0, eviction_policy="evict_first")
        inputs = tl.load(x_rows + at, mask=x_mask, other=0.0)
        # 16 bits of x are exact in tf32, so that three products of tf32 give fp32's
        total = tl.dot(inputs.to(weights.dtype), tl.trans(weights), total, input_precision="tf32x3")
    mask = (row < rows)[:, None] & (out < size)[None, :]
    if bias is not None:
        total += tl.load(bias + out, mask=out < size, other=0.0).to(tl.float32)[None, :]
    tl.store(output + row[:, None] * size + out[None, :], total.to(output.dtype.element_ty), mask=mask)
