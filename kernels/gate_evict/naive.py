"""Eviction in place, in plain torch: the reference, and what runs where there is no fused kernel."""

import torch

from retention_gates.kernels.gate_evict.layout import slot_table


def gate_evict(
    keys: torch.Tensor,
    values: torch.Tensor,
    score: torch.Tensor,
    positions: torch.Tensor,
    pending: torch.Tensor,
    new_key: torch.Tensor,
    new_value: torch.Tensor,
    new_score: torch.Tensor,
    new_position: torch.Tensor,
    step: torch.Tensor,
    head_offsets: tuple[int, ...],
    *,
    linear_in_age: bool,
    buffer_size: int = 1,
    recent: torch.Tensor | None = None,
) -> None:
    """Arguments and effect as in the package's `gate_evict`."""
    table = slot_table(head_offsets, keys.device)
    positions.masked_fill_(pending, -1)
    held = table.by_head(positions)  # [B, H, S]
    empty = table.exists & (held < 0)
    first = empty.to(torch.uint8).argmax(2, keepdim=True)  # [B, H, 1]
    slot = table.slot.expand_as(held).gather(2, first).squeeze(2)  # [B, H]
    entering = new_position[:, None].expand_as(slot)
    keys.scatter_(1, slot[..., None].expand(-1, -1, keys.shape[2]), new_key.squeeze(2))
    values.scatter_(1, slot[..., None].expand(-1, -1, values.shape[2]), new_value.squeeze(2))
    score.scatter_(1, slot, new_score)
    positions.scatter_(1, slot, entering)
    held.scatter_(2, first, entering[..., None])
    held.masked_fill_(~table.exists, -1)

    full = (held >= 0).sum(2) == table.sizes  # [B, H]
    victims = _lowest(
        _priority(table.by_head(score), held, step, linear_in_age, recent), held, full * buffer_size, buffer_size
    )
    pending.copy_(table.ragged(victims))


def chunk_evict(
    keys: torch.Tensor,
    values: torch.Tensor,
    score: torch.Tensor,
    positions: torch.Tensor,
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
    table = slot_table(head_offsets, keys.device)
    batch, heads, tokens, _ = new_key.shape
    slots = table.slot.shape[1]
    held = table.by_head(positions).masked_fill(~table.exists, -1)
    entering = new_positions[:, None].expand(batch, heads, tokens)
    everyone = torch.cat([held, entering], dim=2)  # [B, H, S + T]
    scores = torch.cat([table.by_head(score), new_score], dim=2)
    count = (everyone >= 0).sum(2)
    surplus = (count - (table.sizes - buffer_size)).where(count >= table.sizes, 0)
    victims = _lowest(_priority(scores, everyone, step, linear_in_age, recent), everyone, surplus, slots + tokens)
    stays, enters = ((everyone >= 0) & ~victims).split([slots, tokens], dim=2)

    # what stays does not move; what enters fills the free slots in order
    free = table.exists & ~stays
    rank = free.cumsum(2) - 1  # [B, H, S]
    filled = free & (rank < enters.sum(2, keepdim=True))
    in_order = (~enters).to(torch.uint8).argsort(dim=2, stable=True)  # those that enter first
    source = in_order.gather(2, rank.clamp(0, tokens - 1))  # index into the chunk
    flat_source = table.ragged(source + torch.arange(heads, device=keys.device)[:, None] * tokens)  # [B, N]
    filled_row = table.ragged(filled)
    for state, new in ((keys, new_key), (values, new_value)):
        chosen = new.reshape(batch, heads * tokens, -1).gather(1, flat_source[..., None].expand_as(state))
        state.copy_(chosen.where(filled_row[..., None], state))
    score.copy_(new_score.reshape(batch, -1).gather(1, flat_source).where(filled_row, score))
    kept = positions.where(table.ragged(stays), -1)
    positions.copy_(entering.reshape(batch, -1).gather(1, flat_source).where(filled_row, kept))


def _priority(
    score: torch.Tensor, positions: torch.Tensor, step: torch.Tensor, linear_in_age: bool, recent: torch.Tensor | None
) -> torch.Tensor:
    """What decides who goes, lowest first; inf for who may not go. All [B, H, S]."""
    inf = float("inf")
    age = step - positions
    # a protected token's score is inf, which an age of 0 would turn into NaN
    priority = (age * score).masked_fill(score == inf, inf) if linear_in_age else score
    if recent is not None:
        priority = priority.masked_fill(age < recent[:, None], inf)
    return priority.masked_fill(positions < 0, inf)


def _lowest(priority: torch.Tensor, positions: torch.Tensor, count: torch.Tensor, largest_count: int) -> torch.Tensor:
    """Marks the `count` [B, H] entries of lowest (priority, position) of each head, [B, H, S]."""
    if largest_count == 1:
        ties = priority == priority.amin(2, keepdim=True)
        among_ties = positions.masked_fill(~ties, torch.iinfo(positions.dtype).max)
        return (among_ties == among_ties.amin(2, keepdim=True)) & (count > 0)[..., None]
    by_position = positions.argsort(dim=2, stable=True)
    by_priority = priority.gather(2, by_position).argsort(dim=2, stable=True)
    order = by_position.gather(2, by_priority)
    chosen = torch.arange(positions.shape[2], device=positions.device) < count[..., None]
    return torch.zeros_like(chosen).scatter_(2, order, chosen)
