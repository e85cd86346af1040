"""Entries that the last queries attend to stay, and their neighbours."""

import torch
import torch.nn.functional as F

from retention_gates.gates.policies.held import Held
from retention_gates.gates.policies.policy import FeedbackPolicy
from retention_gates.gates.policies.window import empty_window, observe_window

WINDOW = 32  # queries
NEIGHBOURS = 7  # entries, the kernel of the max pooling


def priority(held: Held) -> torch.Tensor:
    """The attention of the observation window's queries, the largest among neighbours.

    The window is the last 32 tokens, which stay (half of the budget if that is less). The paper looks once, at the
    prompt's end; here it looks again at every step, so that the cache stays of one size while decoding. Neighbours
    are neighbours among what is held.

    Source: "SnapKV: LLM Knows What You are Looking for Before Generation", https://arxiv.org/abs/2404.14469
    """
    return held.along_positions(_pool, held.state.sum(3))


def _pool(received: torch.Tensor) -> torch.Tensor:
    return F.max_pool1d(received, NEIGHBOURS, stride=1, padding=NEIGHBOURS // 2)


SNAPKV = FeedbackPolicy(
    name="snapkv",
    recent_fraction=0.5,
    most_recent=WINDOW,
    state_size=WINDOW,
    initial_state=empty_window(WINDOW),
    observe=observe_window,
    priority=priority,
)
