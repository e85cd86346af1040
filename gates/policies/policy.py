"""What a policy is."""

from collections.abc import Callable
from dataclasses import dataclass

import torch

# log_beta [B, H, T] fp32, key [B, H, T, D], offset [B, T] int64, seed, layer index -> score [B, H, T] fp32
Score = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, int, int], torch.Tensor]


@dataclass(frozen=True)
class Policy:
    """A rule that decides which entry of a head goes first: the lowest score, or the lowest age * score.

    A score is set when the token is created, from the token alone, so that nothing is recomputed and any length of
    chunk gives the same. The score function gets log_beta, the key after RoPE, the offset (position counted from the
    row's first real token), a seed and the layer's index.
    """

    name: str
    linear_in_age: bool
    needs_gates: bool  # trained ones, that is; without, log_beta is ignored
    recent_fraction: float  # share of a head's budget that its youngest entries are sure of
    score: Score
