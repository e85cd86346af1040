"""Entries whose keys are most like the others go first."""

import torch
import torch.nn.functional as F

from retention_gates.gates.policies.held import Held
from retention_gates.gates.policies.policy import FeedbackPolicy, NewTokens


def priority(held: Held) -> torch.Tensor:
    """Minus the cosine between a key and the mean of all held keys, each of length 1.

    Source: "KeyDiff: Key Similarity-Based KV Cache Eviction for Long-Context LLM Inference in Resource-Constrained
    Environments", https://arxiv.org/abs/2504.15364
    """
    unit_keys = held.state
    anchor = (unit_keys * held.exists[..., None]).sum(2, keepdim=True)  # [B, H, 1, D]
    return -(unit_keys @ F.normalize(anchor, dim=3).transpose(2, 3)).squeeze(3)


def unit_key(new: NewTokens) -> torch.Tensor:
    return F.normalize(new.key.float(), dim=3)


KEYDIFF = FeedbackPolicy(
    name="keydiff", state_size=lambda head_dim: head_dim, initial_state=unit_key, priority=priority
)
