"""Up to four linear layers of the same few rows as one Triton kernel, an operator that compilers and graphs take."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from retention_gates.kernels.checks import with_unit_stride
from retention_gates.kernels.dispatch import on_own_device

MOST_TOGETHER = 4  # weights of one launch
TF32_BITS: tl.constexpr = tl.constexpr(0xFFFFE000)  # of a number in fp32, those that tf32 has


class Tile(NamedTuple):
    """How one program works."""

    outputs: int
    columns: int  # of the weight, at a time
    warps: int
    stages: int


def tile_for(rows: int, is_wide: bool) -> Tile:
    """For so many rows, and a weight in fp32 or in 16 bits. Much of the weights has to be under way at any time.

    A weight in fp32 is a gate's first layer, with few outputs: programs that are small and look far ahead.
    """
    return Tile(16, 128, 2, 8) if is_wide else Tile(32, 256, 2, 4)


def few_row_linear(x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor | None]) -> list[Tensor]:
    """Arguments and result as in the package's `few_row_linear`."""
    rows = x.reshape(-1, x.shape[-1])
    outputs: dict[int, Tensor] = {}
    order = sorted(range(len(weights)), key=lambda index: weights[index].dtype == x.dtype)  # a launch has two dtypes
    for first in range(0, len(weights), MOST_TOGETHER):
        together = order[first : first + MOST_TOGETHER]
        results = _few_row_linear(rows, [weights[i] for i in together], [biases[i] for i in together])
        outputs |= zip(together, results, strict=True)
    return [outputs[i].view(*x.shape[:-1], len(weight)) for i, weight in enumerate(weights)]


@torch.library.custom_op("retention_gates::few_row_linear", mutates_args=())
@on_own_device
def _few_row_linear(x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor | None]) -> list[Tensor]:
    x = with_unit_stride(x)
    count, (rows, columns) = len(weights), x.shape
    outputs = _empty(x, weights)
    tiles = [tile_for(rows, weight.dtype != x.dtype) for weight in weights]
    first, last = tiles[0], tiles[-1]  # of weights of the first one's dtype, and of the others
    blocks = [triton.cdiv(len(weight), tile.outputs) for weight, tile in zip(weights, tiles, strict=True)]
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
        0.0,
        COUNT=count,
        FIRST=sum(weight.dtype == weights[0].dtype for weight in weights),
        BM=max(8, triton.next_power_of_2(rows)),
        FIRST_TILE=(first.outputs, first.columns, first.stages),
        TILE=(last.outputs, last.columns, last.stages),
        EVEN=columns % first.columns == columns % last.columns == 0,
        num_warps=last.warps,
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
    zero,  # 0.0
    COUNT: tl.constexpr,
    FIRST: tl.constexpr,  # weights of the first one's dtype, which come first; the others share another dtype
    BM: tl.constexpr,
    FIRST_TILE: tl.constexpr,  # outputs, columns and stages of a program that works at one of those weights
    TILE: tl.constexpr,  # at another
    EVEN: tl.constexpr,
):
    program = tl.program_id(0)
    weights = (weight_0, weight_1, weight_2, weight_3)
    biases = (bias_0, bias_1, bias_2, bias_3)
    outputs = (output_0, output_1, output_2, output_3)
    sizes = (size_0, size_1, size_2, size_3)
    strides = (stride_0, stride_1, stride_2, stride_3)
    begins = (0, end_0, end_1, end_2)
    # One loop for each dtype, whose weight is chosen before it: loops of their own would each hold shared memory, and
    # leave room for half as many programs.
    if (FIRST == COUNT) | (program < begins[FIRST % COUNT]):
        _linear(
            x, weights, biases, outputs, sizes, strides, begins, program, rows, columns, x_stride, zero, 0, FIRST, BM,
            FIRST_TILE[0], FIRST_TILE[1], FIRST_TILE[2], EVEN,
        )  # fmt: skip
    else:
        if FIRST < COUNT:
            _linear(
                x, weights, biases, outputs, sizes, strides, begins, program, rows, columns, x_stride, zero, FIRST,
                COUNT, BM, TILE[0], TILE[1], TILE[2], EVEN,
            )  # fmt: skip


@triton.jit
def _linear(
    x, weights, biases, outputs, sizes, strides, begins, program, rows, columns, x_stride, zero, FROM: tl.constexpr,
    TO: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, STAGES: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    """The program's outputs, of that one of the weights FROM..TO that it works at."""
    weight, size, stride, begin = weights[FROM], sizes[FROM], strides[FROM], begins[FROM]
    for i in tl.static_range(FROM + 1, TO):
        if program >= begins[i]:
            weight, size, stride, begin = weights[i], sizes[i], strides[i], begins[i]
    row, out, column = tl.arange(0, BM), (program - begin) * BN + tl.arange(0, BN), tl.arange(0, BK)
    x_rows = x + row[:, None] * x_stride
    weight_rows = weight + out[:, None].to(tl.int64) * stride
    total = tl.zeros([BN, BM], tl.float32)
    rest = tl.zeros([BN, BM], tl.float32)
    nothing = tl.zeros([BN, BM], tl.float32) + zero  # which the compiler cannot know, else it would add to the total
    for start in tl.range(0, columns, BK, num_stages=STAGES):
        at = start + column[None, :]
        weight_mask, x_mask = (out < size)[:, None], (row < rows)[:, None]
        if not EVEN:
            weight_mask, x_mask = weight_mask & (at < columns), x_mask & (at < columns)
        values = tl.load(weight_rows + at, mask=weight_mask, other=0.0, eviction_policy="evict_first")
        inputs = tl.trans(tl.load(x_rows + at, mask=x_mask, other=0.0))
        if weight.dtype.element_ty == tl.float32:
            # 16 bits of x are exact in tf32: only the weight is cut in two. A step's products have a sum of their own,
            # which is added in fp32: tensor cores cut off what they add to a sum, and 1,000 cuts show in the result.
            # (They don't for what is cut off the weight, which has a sum to itself, so that neither waits.)
            high = (values.to(tl.uint32, bitcast=True) & TF32_BITS).to(tl.float32, bitcast=True)
            rest = tl.dot(values - high, inputs.to(tl.float32), rest, input_precision="tf32")
            total += tl.dot(high, inputs.to(tl.float32), nothing, input_precision="tf32")
        else:
            total = tl.dot(values, inputs.to(values.dtype), total)
    total += rest
    mask = (row < rows)[None, :] & (out < size)[:, None]
    for i in tl.static_range(FROM, TO):
        is_own = program >= begins[i]
        if i + 1 < TO:
            is_own &= program < begins[i + 1]
        if is_own:
            result = total
            if biases[i] is not None:
                result += tl.load(biases[i] + out, mask=out < size, other=0.0).to(tl.float32)[:, None]
            place = outputs[i] + row[None, :] * size + out[:, None]
            tl.store(place, result.to(outputs[i].dtype.element_ty), mask=mask)
