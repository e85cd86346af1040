"""Several new tokens attend to ragged slots and to each other, in the memory of slots and one block of queries."""

from collections.abc import Sequence
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch.backends.cuda import SDPAParams, can_use_flash_attention

from retention_gates import compat
from retention_gates.gates.attention.masked import masked_attention
from retention_gates.kernels.gate_evict import slot_table
from retention_gates.kernels.softmax import Softmax

QUERIES = 512  # of a chunk that have a mask at a time, QUERIES x (slots + chunk) bytes per row and head
flash_attention = compat.flash_attention_forward  # the one that takes sequences of different lengths


def attend_chunk(
    query: torch.Tensor,
    slots: Sequence[torch.Tensor] | None,
    chunk: Sequence[torch.Tensor],
    head_offsets: tuple[int, ...],
    softmax: Softmax,
    *,
    is_padded: bool,
) -> torch.Tensor:
    """As `attend_in_blocks`, by flash attention where that can do it.

    Args:
        is_padded: whether there may be padding in the chunk.
    """
    if slots is not None and softmax.is_plain and not is_padded and _flash_takes(query, *chunk[:2]):
        return attend_packed(query, slots, chunk, head_offsets, softmax.scale)
    together = query.is_cuda and softmax.is_plain  # else all logits would be held at once
    return attend_in_blocks(query, slots, chunk, head_offsets, softmax, together=together)


def _flash_takes(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> bool:
    """Whether the device, the dtype, the sizes and torch's switches of backends are such that it can be called."""
    if not query.is_cuda or query.shape[3] % 8:
        return False
    is_grouped = query.shape[1] > key.shape[1]
    return can_use_flash_attention(SDPAParams(query, key, value, None, 0.0, False, is_grouped))


def attend_packed(
    query: torch.Tensor,
    slots: Sequence[torch.Tensor],
    chunk: Sequence[torch.Tensor],
    head_offsets: tuple[int, ...],
    scale: float,
) -> torch.Tensor:
    """As `attend_in_blocks` for a chunk without padding, without a mask and without filling anything up.

    Every KV head of every row is a sequence of its own in one launch: its held entries, in any order, and the chunk
    after them, so that the mask is causal from the lower right. Nothing is asked of the device.
    """
    key, value = chunk[:2]
    batch, heads, tokens, head_dim = key.shape
    device = key.device
    table = slot_table(head_offsets, device)
    held = table.held(slots[2]) >= 0  # [B, H, S]
    counts = held.sum(2, keepdim=True)
    ends = (counts + tokens).flatten().cumsum(0)  # [B * H], of the sequences
    begins = ends.view(batch, heads, 1) - counts - tokens
    nowhere = batch * (head_offsets[-1] + heads * tokens)  # behind the last place that a sequence can need
    of_slots = table.ragged((begins + held.cumsum(2) - 1).where(held, nowhere))  # [B, N]
    of_chunk = begins + counts + torch.arange(tokens, device=device)  # [B, H, T]

    def packed(in_slots: torch.Tensor, new: torch.Tensor) -> torch.Tensor:
        sequences = new.new_empty(nowhere + 1, 1, new.shape[3])
        sequences[of_slots, 0] = in_slots
        sequences[of_chunk, 0] = new
        return sequences

    output = flash_attention(
        query.view(batch, heads, -1, tokens, head_dim).transpose(2, 3).reshape(batch * heads * tokens, -1, head_dim),
        packed(slots[0], key),
        packed(slots[1], value),
        torch.arange(0, (batch * heads + 1) * tokens, tokens, dtype=torch.int32, device=device),
        F.pad(ends, (1, 0)).int(),
        tokens,
        tokens + max(stop - start for start, stop in pairwise(head_offsets)),
        0.0,  # dropout
        True,  # causal
        False,  # without a mask to debug
        scale=scale,
    )[0]
    # laid out as the output projection reads it, [B, T, HQ, D]
    by_token = output.view(batch, heads, tokens, -1, head_dim).transpose(1, 2).reshape(batch, tokens, -1, head_dim)
    return by_token.transpose(1, 2)


def attend_in_blocks(
    query: torch.Tensor,
    slots: Sequence[torch.Tensor] | None,
    chunk: Sequence[torch.Tensor],
    head_offsets: tuple[int, ...],
    softmax: Softmax,
    *,
    together: bool = False,
) -> torch.Tensor:
    """Each token attends to all held entries, and to the chunk up to itself, [B, HQ, T, Dv]; any rows, any padding.

    Args:
        query: [B, HQ, T, D].
        slots: keys [B, N, D], values [B, N, Dv] and positions [B, N] (-1 for empty) of the held entries, or None.
        chunk: keys [B, H, T, D], values [B, H, T, Dv] and positions [B, T] (-1 for padding) of the new ones.
        head_offsets: head h owns the slots head_offsets[h]:head_offsets[h + 1].
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
                softmax.of_heads(queries),
            )
    return output


def _of_heads(slots: Sequence[torch.Tensor], head_offsets: tuple[int, ...], own: slice) -> list[torch.Tensor]:
    """Returns the contents of one head's slots, or of all heads', filled up to the longest: each [B, h, S, ...]."""
    if own.stop - own.start == 1:
        return [tensor[:, None, head_offsets[own.start] : head_offsets[own.stop]] for tensor in slots]
    table = slot_table(head_offsets, slots[0].device)
    keys, values, positions = slots
    return [table.by_head(keys), table.by_head(values), table.held(positions)]
