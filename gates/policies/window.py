"""The attention of the last queries, for the policies that look at a window of them."""

from collections.abc import Callable

import torch

from retention_gates.gates.policies.held import Held
from retention_gates.gates.policies.policy import NewTokens


def observe_window(held: Held, weights: torch.Tensor, window: int | None = None) -> torch.Tensor:
    """The first K numbers of each entry's state are what it received of the last K queries, of step t in t mod K.

    Args:
        window: K; the whole state if not given.
    """
    window = window or held.state.shape[3]
    weights, is_real = weights[:, :, -window:], held.is_real[:, -window:]
    place = held.query_steps[-window:] % window
    received = weights.transpose(2, 3)  # [B, H, S, n]
    before = held.state.index_select(3, place)
    return held.state.index_copy_(3, place, received.where(is_real[:, None, None], before))


def empty_window(window: int) -> Callable[[NewTokens], torch.Tensor]:
    """The state of a token that no query has seen."""
    return lambda new: new.key.new_zeros((*new.key.shape[:3], window), dtype=torch.float32)
