"""The policy of the trained gates."""

import torch

from retention_gates.gates.policies.policy import Policy


def score(log_beta: torch.Tensor, key: torch.Tensor, offset: torch.Tensor, seed: int, layer: int) -> torch.Tensor:
    """log_beta itself: the entry that has decayed furthest, age * log_beta, goes first.

    Source: TRIM-KV, "Cache What Lasts", https://arxiv.org/abs/2512.03324
    """
    return log_beta


RETENTION = Policy("retention", linear_in_age=True, needs_gates=True, recent_fraction=0.0, score=score)
