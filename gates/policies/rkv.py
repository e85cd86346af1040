"""Entries that are attended to and unlike the others stay."""

import torch
import torch.nn.functional as F

from retention_gates.gates.policies.held import Held
from retention_gates.gates.policies.policy import FeedbackPolicy
from retention_gates.gates.policies.window import empty_window, observe_window

WINDOW = 8  # queries, whose tokens stay
NEIGHBOURS = 7  # entries, the kernel of the max pooling
IMPORTANCE_SHARE = 0.1  # lambda
SIMILAR = 0.5  # cosine above which two keys are alike


def priority(held: Held) -> torch.Tensor:
    """lambda * importance - (1 - lambda) * redundancy, with lambda = 0.1.

    Importance is the attention of the last 8 queries, per query and query head, the largest among neighbours.
    Redundancy is the softmax over the entries of their mean cosine similarity to all held keys, where every key leaves
    out the most recent one that is alike, so that of a group of alike entries the last stays. The paper takes the
    largest logit of a query group, here the group's weights are averaged; it evicts once in 128 tokens and here the
    priorities are computed anew once in 8.

    Source: "R-KV: Redundancy-aware KV Cache Compression for Reasoning Models", https://arxiv.org/abs/2505.24133
    """
    importance = held.along_positions(_pool, held.state.mean(3) / held.group)
    return IMPORTANCE_SHARE * importance - (1 - IMPORTANCE_SHARE) * redundancy(held)


def redundancy(held: Held) -> torch.Tensor:
    exists = held.exists
    unit_keys = F.normalize(held.keys.float(), dim=3) * exists[..., None]
    similarity = unit_keys @ unit_keys.transpose(2, 3)  # [B, H, S, S]
    similarity.diagonal(dim1=2, dim2=3).zero_()
    positions_if_alike = held.positions[:, :, None].where(similarity > SIMILAR, -1)
    last = positions_if_alike.max(dim=3, keepdim=True)
    left_out = similarity.gather(3, last.indices).where(last.values < 0, 0.0)
    similarity.scatter_(3, last.indices, left_out)
    mean = similarity.sum(2) / exists.sum(2, keepdim=True).clamp(min=1)
    return mean.masked_fill(~exists, float("-inf")).softmax(dim=2)


def _pool(received: torch.Tensor) -> torch.Tensor:
    return F.max_pool1d(received, NEIGHBOURS, stride=1, padding=NEIGHBOURS // 2)


RKV = FeedbackPolicy(
    name="rkv",
    recent_fraction=0.5,
    most_recent=WINDOW,
    interval=WINDOW,
    state_size=WINDOW,
    initial_state=empty_window(WINDOW),
    observe=observe_window,
    priority=priority,
)
