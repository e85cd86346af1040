"""The policy of the trained gates."""

import torch

from retention_gates.gates.policies.policy import NewTokens, ScoredPolicy


def score(new: NewTokens) -> torch.Tensor:
    """log_beta itself: the entry that has decayed furthest, age * log_beta, goes first.

    Source: TRIM-KV, "Cache What Lasts", https://arxiv.org/abs/2512.03324
    """
    return new.log_beta


RETENTION = ScoredPolicy(name="retention", linear_in_age=True, is_log_beta=True, needs_gates=True, score=score)
