"""The last tokens, and those that the last tokens attend to, reconsidered at every step."""

import torch

from retention_gates.gates.policies.held import Held
from retention_gates.gates.policies.policy import FeedbackPolicy
from retention_gates.gates.policies.window import empty_window, observe_window

WINDOW = 32  # queries


def priority(held: Held) -> torch.Tensor:
    """The attention that the window's queries gave an entry, added up (the paper's sum fusion).

    The window is the last 32 tokens, which stay (half of the budget if that is less).

    Source: "Dialogue Without Limits: Constant-Sized KV Caches for Extended Responses in LLMs" (MorphKV),
    https://arxiv.org/abs/2503.00979
    """
    return held.state.sum(3)


MORPHKV = FeedbackPolicy(
    name="morphkv",
    recent_fraction=0.5,
    most_recent=WINDOW,
    state_size=WINDOW,
    initial_state=empty_window(WINDOW),
    observe=observe_window,
    priority=priority,
)
