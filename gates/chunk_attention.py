"""Several new tokens attend to ragged slots and to each other, in the memory of slots and one block of queries."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch.nn.attention.bias import causal_lower_right

from retention_gates.gates.masked_attention import masked_attention
from retention_gates.kernels.gate_evict import slot_table

QUERIES = 512  # of a chunk that have a mask at a time, QUERIES x (slots + chunk) bytes per row and head


def attend_in_blocks(
    query: torch.Tensor,
    slots: Sequence[torch.Tensor] | None,
    chunk: Sequence[torch.Tensor],
    head_offsets: tuple[int, ...],
    *,
    scale: float,
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,
    together: bool = False,
) -> torch.Tensor:
    """Each token attends to all held entries, and to the chunk up to itself, [B, HQ, T, Dv]; any rows, any padding.

    Args:
        query: [B, HQ, T, D].
        slots: keys [B, N, D], values [B, N, Dv] and positions [B, N] (-1 for empty) of the held entries, or None.
        chunk: keys [B, H, T, D], values [B, H, T, Dv] and positions [B, T] (-1 for padding) of the new ones.
        head_offsets: head h owns the slots head_offsets[h]:head_offsets[h + 1].
        scale, softcap, sinks: as for `masked_attention`.
        together: all heads in one call, filled up to the longest, which suits a device that waits for Python; or one
            after the other, which computes less where budgets differ.
    """
    key, value, positions = chunk
    heads, tokens = key.shape[1:3]
    group = query.shape[1] // heads
    is_real = (positions >= 0)[:, None, None]  # [B, 1, 1, T]
    output = query.new_empty(*query.shape[:3], value.shape[3])
    for own in [slice(0, heads)] if together else [slice(head, head + 1) for head in range(heads)]:
        queries = slice(own.start * group, own.stop * group)
        held = None if slots is None else _of_heads(slots, head_offsets, own)
        for first in range(0, tokens, QUERIES):
            stop = min(first + QUERIES, tokens)
            causal = torch.ones(stop - first, stop, dtype=torch.bool, device=key.device).tril(diagonal=first)
            keys, values, visible = key[:, own, :stop], value[:, own, :stop], causal & is_real[..., :stop]
            if held is not None:
                is_held = (held[2] >= 0)[:, :, None].expand(-1, -1, stop - first, -1)  # [B, h, n, S]
                visible = torch.cat([is_held, visible.expand(-1, is_held.shape[1], -1, -1)], dim=3)
                keys, values = torch.cat([held[0], keys], dim=2), torch.cat([held[1], values], dim=2)
            output[:, queries, first:stop] = masked_attention(
                query[:, queries, first:stop],
                keys,
                values,
                visible,
                scale=scale,
                softcap=softcap,
                sinks=None if sinks is None else sinks[queries],
            )
    return output


def _of_heads(slots: Sequence[torch.Tensor], head_offsets: tuple[int, ...], own: slice) -> list[torch.Tensor]:
    """What one head's slots hold, or those of all heads, filled up to the longest: each [B, h, S, ...]."""
    if own.stop - own.start == 1:
        return [tensor[:, None, head_offsets[own.start] : head_offsets[own.stop]] for tensor in slots]
    table = slot_table(head_offsets, slots[0].device)
    keys, values, positions = (table.by_head(tensor) for tensor in slots)
    return [keys, values, positions.masked_fill(~table.exists, -1)]


def even_counts(positions: torch.Tensor, head_offsets: tuple[int, ...]) -> list[int] | None:
    """Entries that each head holds, if that is the same number in every row, else None. Asks the device."""
    table = slot_table(head_offsets, positions.device)
    counts = ((table.by_head(positions) >= 0) & table.exists).sum(2)  # [B, H]
    least, most = torch.stack([counts.amin(0), counts.amax(0)]).tolist()
    return least if least == most else None


def attend_without_mask(
    query: torch.Tensor,
    slots: Sequence[torch.Tensor],
    chunk: Sequence[torch.Tensor],
    head_offsets: tuple[int, ...],
    count: int,
    *,
    scale: float,
) -> torch.Tensor:
    """As `attend_in_blocks` without padding, where all heads of all rows hold `count` entries: CUDA needs no mask.

    Held entries come first and the chunk after them, so that the mask is causal from the lower right, which flash
    attention knows.
    """
    key, value = chunk[:2]
    table = slot_table(head_offsets, key.device)
    held = (table.by_head(slots[2]) >= 0) & table.exists  # [B, H, S]
    in_order = (~held).to(torch.uint8).argsort(dim=2, stable=True)[:, :, :count]  # held ones first
    place = table.slot.expand_as(held).gather(2, in_order)  # [B, H, count]
    rows = torch.arange(len(key), device=key.device)[:, None, None]
    keys, values = (
        torch.cat([tensor[rows, place], new], dim=2) for tensor, new in zip(slots[:2], (key, value), strict=True)
    )
    mask = causal_lower_right(query.shape[2], keys.shape[2])
    is_grouped = query.shape[1] > key.shape[1]
    return F.scaled_dot_product_attention(query, keys, values, mask, scale=scale, enable_gqa=is_grouped)
