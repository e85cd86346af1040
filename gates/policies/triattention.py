"""Entries that queries at the distances to come will attend to stay, as the centres of queries and keys tell."""

import torch

from retention_gates.gates.policies.held import Held, rotate
from retention_gates.gates.policies.policy import FeedbackPolicy

OFFSETS = 17  # distances ahead that count: 1, 2, 4, ... 65,536 tokens
RECENT = 128  # tokens, which stay


def observe(held: Held, weights: torch.Tensor) -> torch.Tensor:
    """Adds queries, as they were before their rotation, to the running sums: count, sum, sum of each pair's length."""
    offsets = held.query_steps - held.start[:, None]  # [B, n]
    counts = held.is_real.float()[:, None]  # [B, 1, n]
    queries = rotate(held.query.float(), -offsets[:, None], held.frequencies) * counts[..., None]  # [B, HQ, n, D]
    batch, heads = held.head_state.shape[:2]
    sums, lengths = (x.sum(2).view(batch, heads, -1) for x in (queries, _lengths(queries)))
    held.head_state.add_(torch.cat([counts.sum(2, keepdim=True).expand(-1, heads, -1).flatten(2), sums, lengths], 2))
    return held.state


def priority(held: Held) -> torch.Tensor:
    """Estimates what queries 1, 2, 4, ... 65,536 tokens ahead will give a key, from the centre of the queries so far.

    For each pair of channels that the rotary embedding turns together, with q its query and k its key as complex
    numbers before rotation, w its frequency and d the distance: |E q| |k| cos(w d + arg E q - arg k), plus
    (E |q| - |E q|) |k| for queries that are spread around their centre. Summed over the pairs, averaged over the
    distances, made comparable between the query heads of a group by mean and standard deviation over the held entries;
    the largest of the group counts.

    The paper measures E q and E |q| beforehand, on any text; here they are means over the sequence so far. It evicts
    once in 128 tokens, which are on top of its budget meanwhile; here they stay (half of the budget if that is less),
    inside the budget, and the priorities are computed anew once in 8. Each head of each layer chooses for itself, one
    of three ways in the authors' code. There, prompts are kept unless told otherwise; here they are not.

    Source: "TriAttention: Efficient Long Reasoning with Trigonometric KV Compression",
    https://arxiv.org/abs/2604.04921
    """
    batch, heads, _, head_dim = held.keys.shape
    pairs = head_dim // 2
    count, sums, lengths = held.head_state.split([1, held.group * head_dim, held.group * pairs], dim=2)
    count = count.clamp(min=1.0)
    centre = (sums / count).view(batch, heads, held.group, head_dim)
    spread = (lengths / count).view(batch, heads, held.group, pairs) - _lengths(centre)
    # the centre is rotated to each distance ahead rather than the keys back, and keys are multiplied with the mean
    ahead = (held.step - held.start)[:, None] + 2 ** torch.arange(OFFSETS, device=held.step.device)  # [B, 17]
    angles = ahead[..., None] * held.frequencies  # [B, 17, D / 2]
    cos, sin = angles.cos().mean(1)[:, None, None], angles.sin().mean(1)[:, None, None]  # [B, 1, 1, D / 2]
    first, second = centre.chunk(2, dim=3)
    centre = torch.cat([first * cos - second * sin, second * cos + first * sin], dim=3)
    keys = held.keys.float()
    scores = keys @ centre.transpose(2, 3) + _lengths(keys) @ spread.transpose(2, 3)  # [B, H, S, G]
    return _standardised(scores, held.exists[..., None]).amax(3)


def _lengths(x: torch.Tensor) -> torch.Tensor:
    """[..., D / 2] of x [..., D]: of each pair of channels."""
    first, second = x.chunk(2, dim=-1)
    return torch.hypot(first, second)


def _standardised(scores: torch.Tensor, exists: torch.Tensor) -> torch.Tensor:
    count = exists.sum(2, keepdim=True).clamp(min=1)
    mean = scores.where(exists, 0.0).sum(2, keepdim=True) / count
    deviation = (scores - mean).where(exists, 0.0).square().sum(2, keepdim=True).div(count).sqrt()
    return (scores - mean) / deviation.clamp(min=1e-6)


TRIATTENTION = FeedbackPolicy(
    name="triattention",
    recent_fraction=0.5,
    most_recent=RECENT,
    interval=8,
    observe=observe,
    looks_at_weights=False,
    priority=priority,
    head_state_size=lambda head_dim, group: 1 + group * (head_dim + head_dim // 2),
    needs_rotation=True,
)
