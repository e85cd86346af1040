"""Entries with large keys go first."""

import torch

from retention_gates.gates.policies.policy import NewTokens, ScoredPolicy


def score(new: NewTokens) -> torch.Tensor:
    """Minus the key's L2 norm: keys of small norm tend to be attended to most.

    Equal tokens have equal norms in the first layer, up to rounding: which of them goes depends on how the keys were
    computed (4 of 5,760 entries differed between a decode and one forward pass of SmolLM2-135M).

    Source: "A Simple and Effective L2 Norm-Based Strategy for KV Cache Compression", https://arxiv.org/abs/2406.11430
    """
    return -new.key.float().norm(dim=-1)


KEY_NORM = ScoredPolicy(name="key_norm", recent_fraction=0.5, score=score)
