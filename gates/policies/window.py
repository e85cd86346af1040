"""The attention of the last queries, for the policies that look at a window of them."""

from collections.abc import Callable

import torch

from retention_gates.gates.policies.held import Held
from retention_gates.gates.policies.policy import NewTokens


def observe_window(held: Held, weights: torch.Tensor) -> torch.Tensor:
    """Each entry's state is what it received of the last K queries, that of step t in place t mod K."""
    window = held.state.shape[3]
    weights, is_real = weights[:, :, -window:], held.is_real[:, -window:]
    place = held.query_steps[-window:] % window
    received = weights.transpose(2, 3)  # [B, H, S, n]
    before = held.state.index_select(3, place)
    return held.state.index_copy_(3, place, received.where(is_real[:, None, None], before))


def empty_window(window: int) -> Callable[[NewTokens], torch.Tensor]:
    """The state of a token that no query has seen."""
    return lambda new: new.key.new_zeros((*new.key.shape[:3], window), dtype=torch.float32)
