"""Eviction in place, in plain torch: the reference, and what runs where there is no fused kernel."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F

from retention_gates.kernels.gate_evict.layout import SlotState, slot_table


def gate_evict(
    state: SlotState,
    new_key: torch.Tensor,
    new_value: torch.Tensor,
    new_score: torch.Tensor | None,
    head_offsets: tuple[int, ...],
    *,
    linear_in_age: bool,
    buffer_size: int = 1,
    recent: torch.Tensor | None = None,
    protected: torch.Tensor | None = None,
    padding_mask: torch.Tensor | None = None,
    gate_hidden: torch.Tensor | None = None,
    gate_weight: torch.Tensor | None = None,
    gate_bias: torch.Tensor | None = None,
) -> None:
    """Arguments and effect as in the package's `gate_evict`; what it takes of a gate comes as three tensors."""
    keys, values, score, positions, pending, start, seen = state
    table = slot_table(head_offsets, keys.device)
    if new_score is None:
        assert gate_hidden is not None and gate_weight is not None and gate_bias is not None
        new_score = finished(gate_hidden, gate_weight, gate_bias)
    new_position = seen.expand(len(start))
    if padding_mask is not None:
        drop_padding(positions, padding_mask[:, :-1])
        is_real = padding_mask[:, -1]
        start += ~is_real & (start == seen)  # rows that have not begun yet
        new_position = new_position.where(is_real, -1)
    if protected is not None:
        offset = (seen - start)[:, None]
        is_protected = ((offset >= protected[:, 0]) & (offset < protected[:, 1])).any(1)
        new_score = new_score.masked_fill(is_protected[:, None], float("inf"))
    positions.masked_fill_(pending, -1)
    entering = ((keys, new_key.squeeze(2)), (values, new_value.squeeze(2)), (score, new_score))
    held = enter_token(entering, positions, new_position, head_offsets)
    full = (held >= 0).sum(2) == table.sizes  # [B, H]
    victims = lowest(
        _priority(table.by_head(score), held, seen, linear_in_age, recent), held, full * buffer_size, buffer_size
    )
    pending.copy_(table.ragged(victims))
    seen += 1


def finished(hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    """Returns a gate's output, log_beta [B, H], after its last layer."""
    return F.logsigmoid(F.linear(hidden.float(), weight, bias))


def drop_padding(positions: torch.Tensor, past: torch.Tensor) -> None:
    """Empties the slots [B, N] of columns that the mask [B, past columns] has come to call padding.

    A row that ends early is filled up with tokens that only the next turn's mask tells from real ones.
    """
    if past.shape[1]:
        real = past.gather(1, positions.clamp(0, past.shape[1] - 1))
        positions.masked_fill_(~real & (positions < past.shape[1]), -1)


def enter_token(
    entering: Sequence[tuple[torch.Tensor, torch.Tensor]],
    positions: torch.Tensor,
    new_position: torch.Tensor,
    head_offsets: tuple[int, ...],
) -> torch.Tensor:
    """Writes one token per row into the first empty slot of every head; what is held then, positions [B, H, S].

    Args:
        entering: a state [B, N, ...] and what the new token has of it, [B, H, ...], changed in place.
        positions: [B, N], changed in place; new_position: [B], -1 for padding.
    """
    table = slot_table(head_offsets, positions.device)
    held = table.held(positions)  # [B, H, S]
    empty = held < 0
    first = (empty if table.is_even else table.exists & empty).to(torch.uint8).argmax(2, keepdim=True)  # [B, H, 1]
    slot = table.slot.expand_as(held).gather(2, first).squeeze(2)  # [B, H]
    after = held.scatter(2, first, new_position[:, None, None].expand_as(first))
    for state, new in (*entering, (positions, new_position[:, None].expand_as(slot))):
        state.scatter_(1, slot.view(*slot.shape, *[1] * (state.ndim - 2)).expand_as(new), new)
    return after


def chunk_evict(
    state: SlotState,
    new_key: torch.Tensor,
    new_value: torch.Tensor,
    new_score: torch.Tensor,
    new_positions: torch.Tensor,
    step: torch.Tensor,
    head_offsets: tuple[int, ...],
    *,
    linear_in_age: bool,
    buffer_size: int = 1,
    recent: torch.Tensor | None = None,
) -> None:
    """Arguments and effect as in the package's `chunk_evict`."""
    keys, values, score, positions = state[:4]
    table = slot_table(head_offsets, keys.device)
    batch, heads, tokens, _ = new_key.shape
    slots = table.slot.shape[1]
    held = table.held(positions)
    everyone = torch.cat([held, new_positions[:, None].expand(batch, heads, tokens)], dim=2)  # [B, H, S + T]
    scores = torch.cat([table.by_head(score), new_score], dim=2)
    count = (everyone >= 0).sum(2)
    surplus = (count - (table.sizes - buffer_size)).where(count >= table.sizes, 0)
    victims = lowest(_priority(scores, everyone, step, linear_in_age, recent), everyone, surplus, slots + tokens)
    chunk = ((keys, new_key), (values, new_value), (score, new_score))
    place_chunk(chunk, positions, new_positions, victims, head_offsets)


def place_chunk(
    entering: Sequence[tuple[torch.Tensor, torch.Tensor]],
    positions: torch.Tensor,
    new_positions: torch.Tensor,
    victims: torch.Tensor,
    head_offsets: tuple[int, ...],
) -> None:
    """Frees the slots of victims and fills free slots with the chunk's other tokens in order; no other entry moves.

    Args:
        entering: a state [B, N, ...] and what the chunk has of it, [B, H, T, ...], changed in place.
        positions: [B, N], changed in place; new_positions: [B, T], -1 for padding.
        victims: bool [B, H, S + T], over a head's slots and the chunk. What stays must fit.
    """
    table = slot_table(head_offsets, positions.device)
    batch, heads, tokens = len(positions), len(table.sizes), new_positions.shape[1]
    held = table.held(positions)
    new = new_positions[:, None].expand(batch, heads, tokens)
    stays, enters = ((torch.cat([held, new], dim=2) >= 0) & ~victims).split([held.shape[2], tokens], dim=2)
    free = table.exists & ~stays
    rank = free.cumsum(2) - 1  # [B, H, S]
    filled = free & (rank < enters.sum(2, keepdim=True))
    in_order = (~enters).to(torch.uint8).argsort(dim=2, stable=True)  # those that enter first
    source = in_order.gather(2, rank.clamp(0, tokens - 1))  # index into the chunk
    flat_source = table.ragged(source + torch.arange(heads, device=positions.device)[:, None] * tokens)  # [B, N]
    filled_row = table.ragged(filled)
    positions.copy_(positions.where(table.ragged(stays), -1))
    for state, of_chunk in (*entering, (positions, new)):
        index = flat_source.view(*flat_source.shape, *[1] * (state.ndim - 2)).expand_as(state)
        chosen = of_chunk.reshape(batch, heads * tokens, *state.shape[2:]).gather(1, index)
        state.copy_(chosen.where(filled_row.view(*filled_row.shape, *[1] * (state.ndim - 2)), state))


def _priority(
    score: torch.Tensor, positions: torch.Tensor, step: torch.Tensor, linear_in_age: bool, recent: torch.Tensor | None
) -> torch.Tensor:
    """Returns the priorities, of which the lowest is evicted first; inf for entries that must stay. All [B, H, S]."""
    inf = float("inf")
    age = step - positions
    # a protected token's score is inf, which an age of 0 would turn into NaN
    priority = (age * score).masked_fill(score == inf, inf) if linear_in_age else score
    if recent is not None:
        priority = priority.masked_fill(age < recent[:, None], inf)
    return priority.masked_fill(positions < 0, inf)


def lowest(priority: torch.Tensor, positions: torch.Tensor, count: torch.Tensor, largest_count: int) -> torch.Tensor:
    """Marks the `count` [B, H] entries of lowest (priority, position) of each head, [B, H, S]."""
    if largest_count == 1:
        ties = priority == priority.amin(2, keepdim=True)
        among_ties = positions.where(ties, torch.iinfo(positions.dtype).max)
        return (among_ties == among_ties.amin(2, keepdim=True)) & (count > 0)[..., None]
    by_position = positions.argsort(dim=2, stable=True)
    by_priority = priority.gather(2, by_position).argsort(dim=2, stable=True)
    order = by_position.gather(2, by_priority)
    chosen = torch.arange(positions.shape[2], device=positions.device) < count[..., None]
    return torch.zeros_like(chosen).scatter_(2, order, chosen)
