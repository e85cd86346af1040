"""Entries with the largest values stay, and of the others a sample, drawn by the attention that they receive."""

import torch
import torch.nn.functional as F

from retention_gates.gates.policies.held import Held
from retention_gates.gates.policies.policy import FeedbackPolicy, NewTokens
from retention_gates.gates.policies.random import mix, uniform
from retention_gates.gates.policies.window import empty_window, observe_window

WINDOW = 64  # queries, whose tokens stay
LARGE_SHARE = 4  # a quarter of the budget is for the largest values
SINKS = 4  # first tokens, which count as large
NEIGHBOURS = 5  # entries, the kernel of the mean pooling
INTERVAL = 8
DRAWS = 2**24  # numbers that a draw may be
LEAST = 1e-30  # attention


def initial_state(new: NewTokens) -> torch.Tensor:
    """A window that no query has filled, and the token's own seed, a whole number below 2^24."""
    return torch.cat([empty_window(WINDOW)(new), (uniform(new) * DRAWS)[..., None]], dim=3)


def observe(held: Held, weights: torch.Tensor) -> torch.Tensor:
    return observe_window(held, weights, WINDOW)


def priority(held: Held) -> torch.Tensor:
    """Infinite for the quarter of the budget with the largest values, else log attention + Gumbel noise.

    A value's size is the range of its channels. The entries with the highest log weight + noise are a sample without
    replacement, each drawn in proportion to its weight: the attention of the last 64 queries, per query that saw the
    entry and per query head, averaged over 5 neighbours. Noise is a hash of the token and of the step, so that a run
    can be repeated.

    The paper keeps 64 recent tokens and 256 large values of 1,024 entries and evicts once in 64 steps, meanwhile above
    its budget; here recent tokens are 64, or half of the budget if that is less, and a sample is drawn once in 8
    steps. Weights are those of the attention itself; the paper computes them anew over the older entries alone.

    Source: "Value-Aware Stochastic KV Cache Eviction for Reasoning Models" (VaSE), https://arxiv.org/abs/2606.03928
    """
    received = held.state[..., :WINDOW].sum(3) / (held.age + 1).clamp(1, WINDOW) / held.group
    weight = held.along_positions(_pool, received).clamp(min=LEAST)
    now = mix(held.step - held.start)[:, None, None]
    draw = mix(held.state[..., WINDOW].long() + now) >> 8
    noise = -((draw.float() + 0.5) / DRAWS).log()
    return (weight.log() - noise.log()).masked_fill(_is_large(held), float("inf"))


def _is_large(held: Held) -> torch.Tensor:
    """Of the entries that may go before the next sample is drawn, those with the largest values."""
    values = held.values.float()
    size = values.amax(3) - values.amin(3)
    size = size.masked_fill(held.positions - held.start[:, None, None] < SINKS, float("inf"))
    recent = (held.budgets // 2).clamp(max=WINDOW)[..., None]
    may_go = held.exists & (held.age > recent - INTERVAL)
    order = size.masked_fill(~may_go, float("-inf")).argsort(dim=2, descending=True, stable=True)
    rank = torch.empty_like(order).scatter_(
        2, order, torch.arange(order.shape[2], device=order.device).expand_as(order)
    )
    return may_go & (rank < (held.budgets // LARGE_SHARE)[..., None])


def _pool(received: torch.Tensor) -> torch.Tensor:
    return F.avg_pool1d(received, NEIGHBOURS, stride=1, padding=NEIGHBOURS // 2)


VASE = FeedbackPolicy(
    name="vase",
    recent_fraction=0.5,
    most_recent=WINDOW,
    interval=INTERVAL,
    state_size=WINDOW + 1,
    initial_state=initial_state,
    observe=observe,
    priority=priority,
)
