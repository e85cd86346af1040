"""Evictions of policies that look at what is held, simulated step by step over a sequence known beforehand."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from retention_gates.gates import feedback
from retention_gates.gates.eviction_rule import EvictionRule
from retention_gates.gates.masked_attention import masked_attention
from retention_gates.gates.policies import FeedbackPolicy, Held, NewTokens
from retention_gates.kernels.slot_attention import entry_weights


class Simulated(NamedTuple):
    times: torch.Tensor  # int64 [B, H, T], the first step at which each token is no longer seen
    output: torch.Tensor | None  # [B, HQ, T, Dv] if entries are merged, which attention afterwards cannot know


@torch.no_grad()
def simulate_steps(
    rules: Sequence[EvictionRule],
    query: torch.Tensor,
    new: NewTokens,
    valid: torch.Tensor | None,
    *,
    scale: float,
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,
) -> Simulated:
    """When a bounded cache would evict each token, for all rows and all rules of one policy side by side.

    In one layer queries, keys and values of all steps are known before the first eviction; what is evicted decides
    only which weights an entry receives. So a step is a handful of small operations on [B, H, S], and no model runs.

    Args:
        rules: of one layer; they differ in their budgets only, and in no interval. The batch has the first
            rule's rows first, and so on.
        query: [B, HQ, T, D], after RoPE.
        valid: bool [B, T], False for padding, or None.
    """
    policy = rules[0].policy
    assert isinstance(policy, FeedbackPolicy)
    batch, heads, tokens, head_dim = new.key.shape
    rows, device = batch // len(rules), new.key.device
    sizes = torch.tensor([rule.sizes for rule in rules], device=device).repeat_interleave(rows, dim=0)  # [B, H]
    settings = [rule.setting(rows, scale, device) for rule in rules]
    setting = settings[0]._replace(budgets=torch.cat([one.budgets for one in settings]))
    buffer_size, interval, recents = rules[0].buffer_size, rules[0].interval, [rule.recent(device) for rule in rules]
    recent = None
    if recents[0] is not None:
        recent = torch.stack([one for one in recents if one is not None]).repeat_interleave(rows, dim=0)
    floor = None
    if rules[0].is_shared:
        floors = torch.tensor([rule.floor for rule in rules], device=device)
        floor = floors.repeat_interleave(rows)[:, None]
    slots = int(sizes.max())
    exists = torch.arange(slots, device=device) < sizes[..., None]  # [B, H, S]

    barred_of = torch.zeros_like(new.log_beta).masked_fill(rules[0].is_protected(new.offset)[:, None], float("inf"))
    state_of = policy.initial_state(new)
    real = torch.ones(batch, tokens, dtype=torch.bool, device=device) if valid is None else valid
    start = (real.cumsum(1) == 0).sum(1)
    # merged entries must be rounded as the cache rounds them; others are looked at in fp32 only
    dtype = new.key.dtype if policy.merge else torch.float32
    keys = torch.zeros(batch, heads, slots, head_dim, dtype=dtype, device=device)
    values = torch.zeros(batch, heads, slots, new.value.shape[3], dtype=dtype, device=device)
    state = torch.zeros(batch, heads, slots, state_of.shape[3], device=device)
    group = query.shape[1] // heads
    head_state = torch.zeros(batch, heads, policy.head_state_size(head_dim, group), device=device)
    priority = torch.full((batch, heads, slots), float("inf"), device=device)
    barred = torch.zeros(batch, heads, slots, device=device)
    positions = torch.full((batch, heads, slots), -1, device=device)
    times = torch.full((batch, heads, tokens + 1), tokens, device=device)  # the last column is nobody's
    key_of, value_of, query_of = new.key.to(dtype), new.value.to(dtype), query.to(dtype)
    held_by = {"keys": keys, "values": values}
    outputs = []
    arguments: dict[str, Any] = dict(scale=scale, softcap=softcap, sinks=sinks)
    for step, column in enumerate(torch.arange(tokens, device=device)):
        one = slice(step, step + 1)
        slot = (exists & (positions < 0)).to(torch.uint8).argmax(2, keepdim=True)  # [B, H, 1]
        entering = column if valid is None else column.where(real[:, step], -1)[:, None, None]
        positions.scatter_(2, slot, entering.expand(batch, heads, 1))
        barred.scatter_(2, slot, barred_of[:, :, one])
        for held_of, token_of in ((keys, key_of), (values, value_of), (state, state_of)):
            held_of.scatter_(2, slot[..., None].expand(-1, -1, -1, held_of.shape[3]), token_of[:, :, one])
        now = query_of[:, :, one], real[:, one], column, start
        held = Held(positions, state, head_state, *now, held_by.__getitem__, setting)
        visible = held.exists[:, :, None]
        if policy.observe is not None:
            weights = entry_weights(held.query, keys, visible, **arguments) if policy.needs_attention else None
            feedback.observe(policy, held, weights, is_padded=valid is not None)
            state = held.state
        if policy.merge is not None:
            outputs.append(masked_attention(held.query, keys, values, visible, **arguments))
        if (step + 1) % interval == 0:
            priority = feedback.priorities(policy, held)
        else:
            priority.scatter_(2, slot, float("inf"))
        surplus = feedback.surplus(held.exists.sum(2), held.budgets, buffer_size, rules[0].is_shared)
        victims = feedback.victims(priority, held, barred, recent, surplus, rules[0].most_victims, floor)
        if policy.merge is not None:
            merged = policy.merge(held, victims, rules[0].most_victims)
            keys.copy_(merged[0])
            values.copy_(merged[1])
        times.scatter_(2, positions.where(victims, tokens), step + 1)
        positions.masked_fill_(victims, -1)
    times = times[:, :, :tokens]
    if valid is not None:
        times = times.masked_fill(~real[:, None], 0)
    return Simulated(times, torch.cat(outputs, dim=2) if outputs else None)
