"""One step of a policy that looks at what is held: its numbers are updated and entries are evicted."""

import torch

from retention_gates.gates.policies import FeedbackPolicy, Held
from retention_gates.gates.policies.eviction_rule import Reserve
from retention_gates.kernels.gate_evict import lowest


def observe(policy: FeedbackPolicy, held: Held, weights: torch.Tensor | None, is_padded: bool) -> None:
    """Lets the policy see the attention [B, H, n, S] that entries received of the block's n queries, if it looks."""
    assert policy.observe is not None
    if weights is None:
        weights = held.state.new_zeros(*held.positions.shape[:2], 0, held.positions.shape[2])
    elif is_padded:
        weights = weights.masked_fill(~held.is_real[:, None, :, None], 0.0)
    before = held.state
    after = policy.observe(held, weights)
    if is_padded and after is not before:
        has_real = held.is_real.any(1)[:, None, None, None]
        after = after.where(has_real, before)
    held.state = after.contiguous()


def priorities(policy: FeedbackPolicy, held: Held) -> torch.Tensor:
    """The policy's priorities, fp32 [B, H, S] and finite: inf means that an entry stays."""
    limits = torch.finfo(torch.float32)
    return policy.priority(held).float().nan_to_num(nan=limits.min, posinf=limits.max, neginf=limits.min)


def surplus(count: torch.Tensor, budgets: torch.Tensor, buffer_size: int, is_shared: bool) -> torch.Tensor:
    """Counts the entries to evict, int64 [B, H], or [B, 1] for all heads together if they share their budgets.

    Args:
        count, budgets: int64 [B, H], what each head holds, and may hold.
        buffer_size: entries per head above the budget that call for an eviction.
    """
    room = buffer_size
    if is_shared:
        room *= count.shape[1]
        count, budgets = count.sum(1, keepdim=True), budgets.sum(1, keepdim=True)
    return (count - budgets).where(count >= budgets + room, 0)


def stays(held: Held, barred: torch.Tensor, recent: torch.Tensor | None) -> torch.Tensor:
    """Returns the places that must stay as they are, bool [B, H, S]: empty, protected and recent ones.

    Args:
        barred: fp32 [B, H, S], inf for protected entries.
        recent: int64, broadcastable to [B, H], the age below which an entry stays; or None.
    """
    result = ~held.exists | (barred == float("inf"))
    return result if recent is None else result | (held.age < recent[..., None])


def best_of_spans(
    priority: torch.Tensor, held: Held, stays: torch.Tensor, reserved: tuple[Reserve, ...]
) -> torch.Tensor:
    """The entries of highest priority in each span, as many as are reserved there, bool [B, H, S]."""
    offsets, places = held.positions - held.start[:, None, None], priority.shape[2]
    ranked = torch.where(stays, float("inf"), priority)
    best = torch.zeros_like(stays)
    for start, stop, entries in reserved:
        inside = held.exists & (offsets >= start) & (offsets < stop)
        others = torch.full(priority.shape[:2], max(0, places - entries), device=priority.device)
        of_span = ranked.masked_fill(~inside, float("-inf"))
        best |= inside & ~lowest(of_span, held.positions, others, places)
    return best


def victims(
    priority: torch.Tensor,
    held: Held,
    stays: torch.Tensor,
    surplus: torch.Tensor,
    largest_surplus: int,
    floor: torch.Tensor | None,
    reserved: tuple[Reserve, ...] = (),
) -> torch.Tensor:
    """The entries that go, bool [B, H, S]: the `surplus` of lowest priority.

    Args:
        priority: fp32 [B, H, S]; inf for an entry that stays, too.
        stays: bool [B, H, S], empty places among them.
        surplus: int64 [B, H], or [B, 1] if the heads share their budgets, at most largest_surplus.
        floor: int64, broadcastable to [B, H], the best entries that each head is sure of if they do, else None.
        reserved: spans of which the best entries stay.
    """
    if reserved:
        stays = stays | best_of_spans(priority, held, stays, reserved)
    inf, positions = float("inf"), held.positions
    if floor is None:
        return lowest(torch.where(stays, inf, priority), positions, surplus, largest_surplus)
    batch, heads, places = priority.shape
    ranked = torch.where(stays, inf, priority).masked_fill(~held.exists, -inf)
    is_sure = ~lowest(ranked, positions, (places - floor).expand(batch, heads), places)
    priority = torch.where(stays | is_sure, inf, priority).view(batch, 1, -1)
    return lowest(priority, positions.reshape(batch, 1, -1), surplus, places).view_as(stays)
