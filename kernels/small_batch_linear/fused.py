"""Up to four linear layers of the same few rows as one Triton kernel, an operator that compilers and graphs take."""

from collections.abc import Collection, Sequence
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from retention_gates.kernels.checks import with_unit_stride
from retention_gates.kernels.dispatch import multiprocessors, on_own_device
from retention_gates.kernels.small_batch_linear.kernel import linears

MOST_TOGETHER = 4  # weights of one launch


class Tile(NamedTuple):
    """The sizes of one program's work."""

    outputs: int
    columns: int  # of the weight, at a time
    warps: int
    stages: int


# of a weight in fp32, a gate's first layer, with few outputs: programs that are small and look far ahead
WIDE = Tile(16, 128, 2, 8)


def tile_for(outputs: int, units: int, with_wide: bool) -> Tile:
    """For weights in 16 bits. Much of them has to be under way at any time, in few programs or in many.

    Args:
        outputs: of all of them.
        units: multiprocessors of the device.
        with_wide: whether there is a weight in fp32 in the same launch, whose programs have two warps.
    """
    if outputs >= 2 * 64 * units and not with_wide:
        return Tile(64, 128, 4, 3)
    return Tile(32, 256, 2, 5 if outputs <= 32 * units else 3)


def small_batch_linear(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    *,
    silu: Collection[int] = (),
    residual: Tensor | None = None,
    multiply: bool = False,
) -> list[Tensor]:
    """Arguments and result as in the package's `small_batch_linear`."""
    rows = x.reshape(-1, x.shape[-1])
    if residual is not None:
        residual = residual.reshape(len(rows), -1)
    outputs: dict[int, Tensor] = {}
    order = sorted(range(len(weights)), key=lambda index: weights[index].dtype == x.dtype)  # a launch has two dtypes
    for first in range(0, len(weights), MOST_TOGETHER):
        together = order[first : first + MOST_TOGETHER]
        results = _small_batch_linear(
            rows,
            [weights[i] for i in together],
            [biases[i] for i in together],
            [i in silu for i in together],
            residual,
            multiply,
        )
        outputs |= zip(together, results, strict=False)
    return [outputs[i].view(*x.shape[:-1], -1) for i in sorted(outputs)]


@torch.library.custom_op("retention_gates::small_batch_linear", mutates_args=())
@on_own_device
def _small_batch_linear(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    silu: Sequence[bool],
    residual: Tensor | None,
    multiply: bool,
) -> list[Tensor]:
    x = with_unit_stride(x)
    count, (rows, columns) = len(weights), x.shape
    outputs = _empty(x, weights, multiply)
    of_16_bits = [len(weight) for weight in weights if weight.dtype == x.dtype]
    tile = tile_for(sum(of_16_bits), multiprocessors(x.device), len(of_16_bits) < count)
    tiles = [tile if weight.dtype == x.dtype else WIDE for weight in weights]
    first, last = tiles[0], tiles[-1]  # of weights of the first one's dtype, and of the others
    blocks = [triton.cdiv(len(weight), tile.outputs) for weight, tile in zip(weights, tiles, strict=True)]
    if multiply:
        blocks = [triton.cdiv(len(weights[0]), first.outputs // 2), 0]
    ends = [sum(blocks[: index + 1]) for index in range(count)]
    none = [None] * (MOST_TOGETHER - count)
    ends += ends[-1:] * len(none)
    if residual is not None:
        residual = with_unit_stride(residual)
    linears[(ends[-1],)](
        x,
        *(*weights, *none),
        *(*biases, *none),
        *(*outputs, *[None] * (MOST_TOGETHER - len(outputs))),
        residual,
        *(0 if weight is None else weight.shape[0] for weight in (*weights, *none)),
        *(0 if weight is None else weight.stride(0) for weight in (*weights, *none)),
        *ends[:-1],
        rows,
        columns,
        x.stride(0),
        0 if residual is None else residual.stride(0),
        0.0,
        COUNT=count,
        FIRST=sum(weight.dtype == weights[0].dtype for weight in weights),
        BM=max(8, triton.next_power_of_2(rows)),
        FIRST_TILE=(first.outputs, first.columns, first.stages),
        TILE=(last.outputs, last.columns, last.stages),
        EVEN=columns % first.columns == columns % last.columns == 0,
        SILU=sum(bool(each) << index for index, each in enumerate(silu)),
        MULTIPLY=multiply,
        num_warps=last.warps,
    )
    return outputs


@_small_batch_linear.register_fake
def _(x: Tensor, weights: Sequence[Tensor], biases: Any, silu: Any, residual: Any, multiply: bool) -> list[Tensor]:
    return _empty(x, weights, multiply)


def _empty(x: Tensor, weights: Sequence[Tensor], multiply: bool) -> list[Tensor]:
    results = weights[:1] if multiply else weights
    return [x.new_empty(len(x), len(weight), dtype=weight.dtype) for weight in results]
