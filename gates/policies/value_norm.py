"""Entries with small values go first."""

import torch

from retention_gates.gates.policies.policy import NewTokens, ScoredPolicy


def score(new: NewTokens) -> torch.Tensor:
    """The value's L2 norm: what an entry adds to an output is its weight times its value.

    The part of "Attention Score is not All You Need for Token Importance Indicator in KV Cache Reduction: Value Also
    Matters", https://arxiv.org/abs/2406.12335, that needs no attention (the paper multiplies it with accumulated
    attention, and takes the L1 norm).
    """
    return new.value.float().norm(dim=-1)


VALUE_NORM = ScoredPolicy(name="value_norm", recent_fraction=0.5, score=score)
