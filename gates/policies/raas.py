"""Milestones: the entry that was last of use the longest ago goes first."""

import torch

from retention_gates.gates.policies.held import Held
from retention_gates.gates.policies.policy import FeedbackPolicy

SHARE = 0.5  # of the entries a query sees that it stamps


def observe(held: Held, weights: torch.Tensor) -> torch.Tensor:
    """The time stamp: the last step at which an entry was in the upper half by attention, or its creation.

    The paper keeps the whole prompt besides and works by pages; here the prompt counts like the rest, token by token.

    Source: "RaaS: Reasoning-Aware Attention Sparsity for Efficient LLM Reasoning", https://arxiv.org/abs/2502.11147
    """
    seen = (held.positions[:, :, None] >= 0) & (held.positions[:, :, None] <= held.query_steps[:, None])
    seen &= held.is_real[:, None, :, None]  # [B, H, n, S]
    ranked = weights.masked_fill(~seen, -1.0).sort(dim=3, descending=True).values
    stamped = (seen.sum(3, keepdim=True) * SHARE).ceil().long()  # [B, H, n, 1]
    least = ranked.gather(3, (stamped - 1).clamp(min=0))
    is_own = held.positions[:, :, None] == held.query_steps[:, None]  # a new token has the stamp of its creation
    stamps = held.query_steps.float()[:, None].where(seen & ((weights >= least) | is_own), -1.0)
    return torch.maximum(held.state, stamps.amax(2)[..., None])


RAAS = FeedbackPolicy(name="raas", observe=observe)
