"""Attention over ragged slots as Triton kernels, an operator that torch.compile and graphs take."""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from triton import cdiv, next_power_of_2

from retention_gates.kernels.checks import with_unit_stride
from retention_gates.kernels.dispatch import on_own_device
from retention_gates.kernels.ragged_decode_attention.kernel import attend_parts, sum_parts, sum_received
from retention_gates.kernels.ragged_decode_attention.parts import parts_of
from retention_gates.kernels.softmax import Softmax

LARGEST_HEAD_DIM = 256
SUM_NUMBERS = 8192  # fp32 numbers of partial outputs that are read at a time
SUM_WARPS = 4
SUM_BEGINS_EARLY = True  # on devices that can, programs of the sum are started while parts are read, and wait
SHORT_PART = 128  # slots


class Tile(NamedTuple):
    """The sizes of one program's work."""

    block: int  # slots at a time
    warps: int
    stages: int


def block_for(head_dim: int, element_size: int) -> int:
    """Slots that parts are multiples of: 64 of 128 numbers of 16 bits are 16 KiB of keys and as much of values."""
    return max(16, min(64, 64 * 256 // (next_power_of_2(head_dim) * element_size)))


def most_rows(head_dim: int, element_size: int) -> int:
    """Queries of one KV head that a program takes: with more, outputs and products do not fit its registers."""
    if element_size == 4:
        return 16
    return 64 if head_dim <= 128 else 32


def tile_for(block: int, length: int, rows: int) -> Tile:
    """For parts of `length` slots and `rows` queries. In short parts, two warps have less to wait for than four.

    With two stages, a tile is asked for when the one before has been read; with three, while that is waited for.
    """
    if block >= 32 and length <= SHORT_PART and rows <= 16:
        return Tile(block // 2, 2, 2 if length <= block else 3)
    return Tile(block, 4, 2)


def ragged_decode_attention(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    positions: Tensor,
    head_offsets: tuple[int, ...],
    softmax: Softmax,
    *,
    received: Tensor | None = None,
    run: tuple[Tensor, Tensor, Tensor] | None = None,
) -> Tensor:
    """Arguments and result as in the package's `ragged_decode_attention`."""
    for name, tensor in (("query", query), ("values", values)):
        if tensor.shape[-1] > LARGEST_HEAD_DIM:
            raise ValueError(
                f"{name} has head dim {tensor.shape[-1]}; the fused kernel takes up to {LARGEST_HEAD_DIM}: set "
                "RETENTION_GATES_KERNELS=naive."
            )
    if query.dtype not in (torch.float16, torch.bfloat16, torch.float32):
        raise ValueError(
            f"query is {query.dtype}; the fused kernel takes float16, bfloat16 and float32: cast it, or set "
            "RETENTION_GATES_KERNELS=naive."
        )
    state = dict(keys=keys, values=values, positions=positions, received=received)
    for name, one in state.items():
        if one is not None and not one.is_contiguous():
            raise ValueError(f"{name} has strides {one.stride()}; the fused kernel takes contiguous state only.")
    scale, softcap, sinks = softmax
    new_key, new_value, new_positions = (None, None, None) if run is None else run
    arguments = (query, keys, values, positions, head_offsets, new_key, new_value, new_positions, sinks)
    if received is None:
        return _ragged_decode_attention(*arguments, scale, softcap)
    return _ragged_decode_attention_received(*arguments, received, scale, softcap)


# two operators: the compiler of torch 2.11 to 2.13 fails on one whose only argument to change is None
@torch.library.custom_op("retention_gates::ragged_decode_attention", mutates_args=())
@on_own_device
def _ragged_decode_attention(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    positions: Tensor,
    head_offsets: Sequence[int],
    new_key: Tensor | None,
    new_value: Tensor | None,
    new_positions: Tensor | None,
    sinks: Tensor | None,
    scale: float,
    softcap: float | None,
) -> Tensor:
    arguments = (query, keys, values, positions, head_offsets, new_key, new_value, new_positions, sinks)
    return _attend(*arguments, None, scale, softcap)


@torch.library.custom_op("retention_gates::ragged_decode_attention_received", mutates_args=("received",))
@on_own_device
def _ragged_decode_attention_received(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    positions: Tensor,
    head_offsets: Sequence[int],
    new_key: Tensor | None,
    new_value: Tensor | None,
    new_positions: Tensor | None,
    sinks: Tensor | None,
    received: Tensor,
    scale: float,
    softcap: float | None,
) -> Tensor:
    arguments = (query, keys, values, positions, head_offsets, new_key, new_value, new_positions, sinks)
    return _attend(*arguments, received, scale, softcap)


def _attend(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    positions: Tensor,
    head_offsets: Sequence[int],
    new_key: Tensor | None,
    new_value: Tensor | None,
    new_positions: Tensor | None,
    sinks: Tensor | None,
    received: Tensor | None,
    scale: float,
    softcap: float | None,
) -> Tensor:
    batch, query_heads, tokens, head_dim = query.shape
    slots, value_dim = values.shape[1:]
    heads = len(head_offsets) - 1
    group = query_heads // heads
    rows = group * tokens
    size, widest = query.element_size(), max(head_dim, value_dim)
    block_rows = max(16, min(most_rows(widest, size), next_power_of_2(rows)))
    row_blocks = cdiv(rows, block_rows)
    block_dim, block_value = (max(16, next_power_of_2(x)) for x in (head_dim, value_dim))
    is_run = new_key is not None
    block = block_for(widest, size)
    parts = parts_of(tuple(head_offsets), batch * row_blocks, block, query.device, is_run)
    tile = tile_for(block, parts.length, rows)
    is_uniform = parts.per_head > 0
    early = SUM_BEGINS_EARLY and parts.most > 1 and _can_begin_early(query.device)

    query = with_unit_stride(query)
    new_key, new_value, new_positions = (
        None if x is None else with_unit_stride(x) for x in (new_key, new_value, new_positions)
    )
    sinks = None if sinks is None else sinks.contiguous()
    output = _empty_output(query, values)
    partial, partial_lses, logits, lses = None, None, None, None
    if parts.most > 1:
        partial = query.new_empty(batch, parts.total, rows, value_dim, dtype=torch.float32)
        partial_lses = query.new_empty(batch, parts.total, rows, dtype=torch.float32)
    if received is not None:
        logits = query.new_empty(batch, group, slots, dtype=torch.float32)
        lses = query.new_empty(batch, query_heads, dtype=torch.float32)
    common = dict(
        HQ=query_heads,
        G=group,
        DV=value_dim,
        BDV=block_value,
        HAS_SINKS=sinks is not None,
        HAS_RECEIVED=received is not None,
        UNIFORM=is_uniform,
    )
    grid = (parts.per_head, heads, batch) if is_uniform else (parts.total, 1, batch)
    attend_parts[grid[0] * row_blocks, grid[1], grid[2]](
        query,
        keys,
        values,
        positions,
        new_key,
        new_value,
        new_positions,
        sinks,
        output,
        partial,
        partial_lses,
        logits,
        lses,
        parts.table,
        parts.size,
        parts.length,
        parts.per_head,
        parts.total,
        slots,
        tokens,
        *query.stride()[:3],
        *((0, 0, 0) if new_key is None else new_key.stride()[:3]),
        *((0, 0, 0) if new_value is None else new_value.stride()[:3]),
        0 if new_positions is None else new_positions.stride(0),
        scale * (math.log2(math.e) if softcap is None else 1.0 / softcap),
        0.0 if softcap is None else softcap,
        D=head_dim,
        BD=block_dim,
        BM=block_rows,
        BN=tile.block,
        BR=max(16, next_power_of_2(tokens)),
        STAGES=tile.stages,
        ROW_BLOCKS=row_blocks,
        SPLIT=parts.most > 1,
        IS_RUN=is_run,
        SOFTCAP=softcap is not None,
        PRECISION="ieee" if query.dtype == torch.float32 else "tf32",
        SUM_BEGINS_EARLY=early,
        num_warps=tile.warps,
        **common,
    )
    if parts.most > 1:
        sum_parts[rows, heads, batch](
            partial,
            partial_lses,
            sinks,
            output,
            lses,
            parts.head_parts,
            parts.per_head,
            parts.total,
            tokens,
            PARTS_AT_A_TIME=min(next_power_of_2(parts.most), SUM_NUMBERS // block_value),
            SUM_BEGINS_EARLY=early,
            num_warps=SUM_WARPS,
            **common,
            **({"launch_pdl": True} if early else {}),
        )
    if received is not None:
        sum_received[grid](
            logits,
            lses,
            positions,
            received,
            parts.table,
            parts.size,
            parts.length,
            slots,
            HQ=query_heads,
            G=group,
            BLOCK=block,
            UNIFORM=is_uniform,
            num_warps=2,
        )
    return output.transpose(1, 2)


@_ragged_decode_attention.register_fake
@_ragged_decode_attention_received.register_fake
def _(query: Tensor, keys: Tensor, values: Tensor, *others: Any) -> Tensor:
    return _empty_output(query, values).transpose(1, 2)


def _can_begin_early(device: torch.device) -> bool:
    """Whether the device knows programmatic dependent launch, which graphs take too."""
    return device.type == "cuda" and torch.version.hip is None and torch.cuda.get_device_capability(device) >= (9, 0)


def _empty_output(query: Tensor, values: Tensor) -> Tensor:
    """[B, n, HQ, Dv]: tokens before heads in memory, as the output projection wants it."""
    batch, query_heads, tokens, _ = query.shape
    return query.new_empty(batch, tokens, query_heads, values.shape[2])
