"""One step of a policy that looks at what is held: what it learns, and who goes."""

import torch

from retention_gates.gates.policies import FeedbackPolicy, Held
from retention_gates.kernels.gate_evict import lowest


def observe(policy: FeedbackPolicy, held: Held, weights: torch.Tensor, is_padded: bool) -> None:
    """Lets the policy see the attention [B, H, n, S] that the entries received of the block's n queries."""
    assert policy.observe is not None
    if is_padded:
        weights = weights.masked_fill(~held.is_real[:, None, :, None], 0.0)
    before = held.state
    after = policy.observe(held, weights)
    if is_padded and after is not before:
        has_real = held.is_real.any(1)[:, None, None, None]
        after = after.where(has_real, before)
    held.state = after.contiguous()


def victims(
    policy: FeedbackPolicy,
    held: Held,
    barred: torch.Tensor,
    recent: torch.Tensor | None,
    surplus: torch.Tensor,
    largest_surplus: int,
) -> torch.Tensor:
    """The entries that go, bool [B, H, S]: of each head the `surplus` of lowest priority.

    Args:
        barred: fp32 [B, H, S], inf for protected entries.
        recent: int64, broadcastable to [B, H], the age below which an entry stays; or None.
        surplus: int64 [B, H], at most largest_surplus.
    """
    stays = ~held.exists | (barred == float("inf"))
    if recent is not None:
        stays |= held.age < recent[..., None]
    priority = policy.priority(held).masked_fill(stays, float("inf"))
    return lowest(priority, held.positions, surplus, largest_surplus)
