"""Several new tokens attend to ragged slots and to each other, in the memory of slots and one block of queries."""

from collections.abc import Sequence
from itertools import pairwise

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
) -> torch.Tensor:
    """Each token attends to all held entries, and to the chunk up to itself, [B, HQ, T, Dv]; any rows, any padding.

    Args:
        query: [B, HQ, T, D].
        slots: keys [B, N, D], values [B, N, Dv] and positions [B, N] (-1 for empty) of the held entries, or None.
        chunk: keys [B, H, T, D], values [B, H, T, Dv] and positions [B, T] (-1 for padding) of the new ones.
        head_offsets: head h owns the slots head_offsets[h]:head_offsets[h + 1].
        scale, softcap, sinks: as for `masked_attention`.
    """
    key, value, positions = chunk
    heads, tokens = key.shape[1:3]
    group = query.shape[1] // heads
    is_real = (positions >= 0)[:, None, None]  # [B, 1, 1, T]
    output = query.new_empty(*query.shape[:3], value.shape[3])
    for first in range(0, tokens, QUERIES):
        stop = min(first + QUERIES, tokens)
        causal = torch.ones(stop - first, stop, dtype=torch.bool, device=key.device).tril(diagonal=first)
        visible_chunk = causal & is_real[..., :stop]  # [B, 1, n, stop]
        for head, (start, end) in enumerate(pairwise(head_offsets)):  # one at a time: budgets differ
            queries = slice(head * group, (head + 1) * group)
            keys, values, visible = key[:, head : head + 1, :stop], value[:, head : head + 1, :stop], visible_chunk
            if slots is not None:
                own = [tensor[:, None, start:end] for tensor in slots]
                held = (own[2] >= 0)[:, :, None].expand(-1, -1, stop - first, -1)
                keys, values = torch.cat([own[0], keys], dim=2), torch.cat([own[1], values], dim=2)
                visible = torch.cat([held, visible_chunk], dim=3)
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
    counts: list[int],
    *,
    scale: float,
) -> torch.Tensor:
    """As `attend_in_blocks` without padding, where every row of a head holds as many entries: no mask is made on CUDA.

    Held entries come first and the chunk after them, so that the mask is causal from the lower right, which flash
    attention knows. Heads that hold equally many go together.
    """
    key, value = chunk[:2]
    heads = key.shape[1]
    group = query.shape[1] // heads
    table = slot_table(head_offsets, key.device)
    held = (table.by_head(slots[2]) >= 0) & table.exists  # [B, H, S]
    in_order = (~held).to(torch.uint8).argsort(dim=2, stable=True)  # held ones first
    place = table.slot.expand_as(held).gather(2, in_order)  # [B, H, S]
    rows = torch.arange(len(key), device=key.device)[:, None, None]
    kept = [tensor[rows, place] for tensor in slots[:2]]  # [B, H, S, D]
    by_count: dict[int, list[int]] = {}
    for head, count in enumerate(counts):
        by_count.setdefault(count, []).append(head)
    output = query.new_empty(*query.shape[:3], value.shape[3])
    for count, members in by_count.items():
        own = slice(members[0], members[-1] + 1) if members == [*range(members[0], members[-1] + 1)] else members
        keys, values = (
            torch.cat([old[:, own, :count], new[:, own]], dim=2) for old, new in zip(kept, (key, value), strict=True)
        )
        queries = query.unflatten(1, (heads, group))[:, own].flatten(1, 2)  # [B, h * G, T, D]
        mask = causal_lower_right(queries.shape[2], keys.shape[2])
        found = F.scaled_dot_product_attention(queries, keys, values, mask, scale=scale, enable_gqa=group > 1)
        output.unflatten(1, (heads, group))[:, own] = found.unflatten(1, (len(members), group))
    return output
