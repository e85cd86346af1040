"""Entries that an instruction attends to stay."""

import torch

from retention_gates.gates.policies.held import Held, rotate
from retention_gates.gates.policies.policy import FeedbackPolicy

QUERIES = 16  # of the instruction's last tokens


def observe(held: Held, weights: torch.Tensor) -> torch.Tensor:
    """Keeps the instruction's last queries, as they were before their rotation, the last one last."""
    batch, heads, _ = held.head_state.shape
    head_dim = held.query.shape[3]
    kept = held.head_state.view(batch, heads, QUERIES, held.group * head_dim)
    offsets = held.query_steps - held.start[:, None]  # [B, n]
    queries = rotate(held.query.float(), -offsets[:, None], held.frequencies)
    queries = queries.view(batch, heads, held.group, -1, head_dim).transpose(2, 3).flatten(3)  # [B, H, n, G * D]
    belongs = held.is_instruction(offsets) & held.is_real
    everyone = torch.cat([kept, queries], dim=2)  # in order of position, with some that don't belong
    takes_part = torch.cat([belongs.new_ones(batch, QUERIES), belongs], dim=1)
    last = takes_part.long().argsort(dim=1, stable=True)[:, -QUERIES:]  # those that do are the last, in order
    kept.copy_(everyone.gather(2, last[:, None, :, None].expand(-1, heads, -1, everyone.shape[3])))
    return held.state


def priority(held: Held) -> torch.Tensor:
    """The attention that the instruction's queries would give each entry if the instruction came now.

    The instruction is what the caller pinned. The paper puts it behind every chunk and evicts once a chunk
    (`buffer_size` does that here); we keep the queries of its last 16 tokens and rotate them to the present instead.

    Source: "CItruS: Chunked Instruction-aware State Eviction for Long Sequence Modeling",
    https://arxiv.org/abs/2406.12018
    """
    batch, heads, _, head_dim = held.keys.shape
    kept = held.head_state.view(batch, heads, QUERIES, held.group, head_dim)
    is_known = kept.abs().amax(4) > 0  # [B, H, QUERIES, G]
    now = (held.step - held.start)[:, None] + 1 + torch.arange(QUERIES, device=held.step.device)  # [B, QUERIES]
    queries = rotate(kept.transpose(2, 3), now[:, None, None], held.frequencies).flatten(2, 3)  # [B, H, G * Q, D]
    logits = queries @ held.keys.float().transpose(2, 3) * held.scale
    weights = logits.masked_fill(~held.exists[:, :, None], float("-inf")).softmax(dim=3)
    return (weights * is_known.transpose(2, 3).flatten(2)[..., None]).sum(2)


CITRUS = FeedbackPolicy(
    name="citrus",
    recent_fraction=0.5,
    observe=observe,
    looks_at_weights=False,
    priority=priority,
    head_state_size=lambda head_dim, group: QUERIES * group * head_dim,
    needs_rotation=True,
    needs_instruction=True,
)
