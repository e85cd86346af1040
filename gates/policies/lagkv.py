"""Entries that stand out against the tokens right after them stay."""

import torch

from retention_gates.gates.policies.held import Held
from retention_gates.gates.policies.policy import FeedbackPolicy, NewTokens

SINKS = 4  # first tokens, which no partition counts
LARGEST_LAG = 128  # tokens of a partition
SMALLEST_LAG = 2  # one token has no range


def observe(held: Held, weights: torch.Tensor) -> torch.Tensor:
    """Each entry's rank within its partition, known when the next partition is complete; 1 until then.

    Tokens are partitioned by the lag, and each partition is scored when the next one is complete: keys and values are
    scaled channel by channel to the range of the next partition's, and an entry's score is the sum of the softmaxes,
    over the partition, of the standard deviation over its channels. Ranks, in [0, 1), make partitions comparable. The
    paper's lag is 128 tokens; here it is a quarter of the budget where that is less, because two partitions must be
    held until the first of them is scored.

    Source: "LagKV: Lag-Relative Information of the KV Cache Tells Which Tokens Are Important",
    https://arxiv.org/abs/2504.04704
    """
    lag = _lag(held.budgets)
    counted = (held.step - held.start)[:, None] + 1 - SINKS  # tokens in partitions, up to the last query
    complete = torch.div(counted, lag, rounding_mode="floor").clamp(min=0)
    before = torch.div(counted - held.is_real.shape[1], lag, rounding_mode="floor").clamp(min=0)
    queries = held.is_real.shape[1]
    for new in range(1 if queries == 1 else int((complete - before).max())):
        next_one = before + new  # the partition, [B, H], that scores the one before it
        is_scored = (next_one < complete) & (next_one > 0)
        _score(held, lag, next_one, is_scored)
    return held.state


def is_due(offsets: torch.Tensor, budgets: torch.Tensor) -> torch.Tensor:
    """Whether a partition of any head is complete after a token, bool [B, T]."""
    return ((offsets[:, None] + 1 - SINKS) % _lag(budgets)[..., None] == 0).any(1)


def _lag(budgets: torch.Tensor) -> torch.Tensor:
    return (budgets // 4).clamp(SMALLEST_LAG, LARGEST_LAG)  # [B, H]


def _score(held: Held, lag: torch.Tensor, next_one: torch.Tensor, is_scored: torch.Tensor) -> None:
    offset = held.positions - held.start[:, None, None] - SINKS
    partition = torch.div(offset, lag[..., None], rounding_mode="floor")
    partition = partition.masked_fill(~held.exists | (offset < 0), -1)
    reference = partition == next_one[..., None]
    scored = (partition == next_one[..., None] - 1) & is_scored[..., None]
    total = _spread(held.keys.float(), reference, scored) + _spread(held.values.float(), reference, scored)
    total = total.masked_fill(~scored, float("inf"))
    rank = total.argsort(dim=2, stable=True).argsort(dim=2).float() / lag[..., None]
    held.state[..., 0] = rank.where(scored, held.state[..., 0])


def _spread(x: torch.Tensor, reference: torch.Tensor, scored: torch.Tensor) -> torch.Tensor:
    """[B, H, S] of x [B, H, S, D]; without meaning outside of what is scored."""
    low = x.masked_fill(~reference[..., None], float("inf")).amin(2, keepdim=True)
    high = x.masked_fill(~reference[..., None], float("-inf")).amax(2, keepdim=True)
    spread = ((x - low) / (high - low)).std(dim=3)
    return spread.masked_fill(~scored, float("-inf")).softmax(dim=2)


def unscored(new: NewTokens) -> torch.Tensor:
    return new.key.new_ones((*new.key.shape[:3], 1), dtype=torch.float32)


LAGKV = FeedbackPolicy(
    name="lagkv",
    recent_fraction=0.5,
    observe=observe,
    is_due=is_due,
    looks_at_weights=False,
    initial_state=unscored,
)
