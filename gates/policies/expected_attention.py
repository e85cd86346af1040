"""Entries that the queries to come will attend to stay, as far as the queries so far tell."""

import torch

from retention_gates.gates.policies.held import Held, rotate
from retention_gates.gates.policies.policy import FeedbackPolicy

FUTURE = 512  # positions ahead that count
SINKS = 4  # first queries, which are unlike all others and do not count


def observe(held: Held, weights: torch.Tensor) -> torch.Tensor:
    """Adds queries, as they were before their rotation, to the running sums: count, sum and products of each head."""
    offsets = held.query_steps - held.start[:, None]  # [B, n]
    counts = (held.is_real & (offsets >= SINKS)).float()[:, None]  # [B, 1, n]
    queries = rotate(held.query.float(), -offsets[:, None], held.frequencies) * counts[..., None]  # [B, HQ, n, D]
    batch, heads = held.head_state.shape[:2]
    sums = queries.sum(2).view(batch, heads, -1)
    products = (queries.transpose(2, 3) @ queries).view(batch, heads, -1)
    held.head_state.add_(torch.cat([counts.sum(2, keepdim=True).expand(-1, heads, -1).flatten(2), sums, products], 2))
    return held.state


def priority(held: Held) -> torch.Tensor:
    """The softmax over the entries of log E[exp(q k)], averaged over the query group, times the value's norm.

    q is normal with the mean and the covariance of the queries so far, before rotation, then rotated by the mean
    rotation of the next 512 positions: log E[exp(q k s)] = k mu s + k cov k s^2 / 2, s being the attention's scale.
    The paper looks once, at the prompt's end; here the priorities are computed anew once in 8 tokens.

    Source: "Expected Attention: KV Cache Compression by Estimating Attention from Future Queries Distribution",
    https://arxiv.org/abs/2510.00636
    """
    batch, heads, _, head_dim = held.keys.shape
    count, sums, products = held.head_state.split([1, held.group * head_dim, held.group * head_dim**2], dim=2)
    count = count.clamp(min=1.0)
    mean = (sums / count).view(batch, heads, held.group, head_dim)
    covariance = (products / count).view(batch, heads, held.group, head_dim, head_dim)
    covariance = covariance - mean[..., None] * mean[..., None, :]
    # rotating the keys back is the same as rotating mean and covariance ahead, and keeps them as they are
    ahead = (held.step - held.start)[:, None] + 1 + torch.arange(FUTURE, device=held.step.device)  # [B, FUTURE]
    angles = ahead[..., None] * held.frequencies  # [B, FUTURE, D / 2]
    cos, sin = angles.cos().mean(1)[:, None, None], angles.sin().mean(1)[:, None, None]  # [B, 1, 1, D / 2]
    first, second = held.keys.float().chunk(2, dim=3)
    keys = torch.cat([first * cos + second * sin, second * cos - first * sin], dim=3)[:, :, None]  # [B, H, 1, S, D]
    logits = (keys @ mean[..., None]).squeeze(4) * held.scale  # [B, H, G, S]
    logits = logits + ((keys @ covariance) * keys).sum(4) * (held.scale**2 / 2)
    offsets = held.positions - held.start[:, None, None]
    counts = held.exists & (offsets >= SINKS)
    weights = logits.masked_fill(~counts[:, :, None], float("-inf")).softmax(dim=3).mean(2)
    return (weights * held.values.float().norm(dim=3)).masked_fill(~counts, float("inf"))


EXPECTED_ATTENTION = FeedbackPolicy(
    name="expected_attention",
    recent_fraction=0.5,
    interval=8,
    observe=observe,
    looks_at_weights=False,
    priority=priority,
    head_state_size=lambda head_dim, group: 1 + group * head_dim * (1 + head_dim),
    needs_rotation=True,
)
