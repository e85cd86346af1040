"""Heavy hitters and the most recent, half and half."""

import torch

from retention_gates.gates.policies.held import Held
from retention_gates.gates.policies.policy import FeedbackPolicy


def observe(held: Held, weights: torch.Tensor) -> torch.Tensor:
    """All attention that an entry ever received, added up; half of the budget goes to the most recent entries.

    Source: "H2O: Heavy-Hitter Oracle for Efficient Generative Inference of Large Language Models",
    https://arxiv.org/abs/2306.14048
    """
    return held.state + weights.sum(2)[..., None]


H2O = FeedbackPolicy(name="h2o", recent_fraction=0.5, observe=observe)
