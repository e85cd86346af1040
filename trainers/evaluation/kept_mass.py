"""Budgets that keep most attention, measured for any policy, as calibrated budgets are for the gates."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any

import torch
from torch import nn

from retention_gates.gates.adapter.model import find_gated_model
from retention_gates.gates.adapter.modes import evaluating
from retention_gates.gates.cache.budgets import LEAST_CALIBRATED, Budgets
from retention_gates.gates.policies import FeedbackPolicy, Policy, find_policy
from retention_gates.gates.policies.eviction_rule import EvictionRule
from retention_gates.gates.simulation.simulated_cache import SimulatedCache, SimulatedLayer
from retention_gates.kernels.ragged_decode_attention import entry_weights
from retention_gates.kernels.softmax import Softmax
from retention_gates.trainers.evaluation.contenders import MEASURED, Contender
from retention_gates.trainers.evaluation.forward_passes import check_length, tokens_at_a_time

STEPS = (0.25, 0.5, 1, 2, 4)  # sizes that are tried, in multiples of the mean
QUERIES = 64  # whose weights are computed at a time


def with_measured_budgets(
    model: nn.Module,
    chosen: Sequence[Contender],
    rows: torch.Tensor,
    progress: Callable[[str], Any] = lambda name: None,
) -> list[Contender]:
    """The contenders, those with measured budgets together with the numbers, found on rows [R, T] of other texts.

    Each policy is simulated with several sizes, the same for all heads. What counts is how much of the attention that
    a head would pay to all tokens falls on what it holds, in the later half of the rows: its kept mass. Entries then
    go where they add most to the sum of the kept masses of all heads, memory_size of them per head in the mean. This
    is AdaKV's criterion (arXiv 2407.11550), decided beforehand and between all heads of the model.

    Args:
        progress: is told the name of each policy before it is measured.
    """
    found: list[Contender] = []
    curves: dict[str, dict[int, torch.Tensor]] = {}
    for contender in chosen:
        if contender.budgets != MEASURED:
            found.append(contender)
            continue
        policy = find_policy(contender.policy)
        if policy.name not in curves:
            sizes = [c.memory_size for c in chosen if c.budgets == MEASURED and find_policy(c.policy) is policy]
            progress(policy.name)
            curves[policy.name] = kept_masses(model, policy, _tried(model, policy, sizes), rows)
        least = _least(model, policy, contender.memory_size)
        entries = best_budgets(curves[policy.name], contender.memory_size, least, _is_alike(policy))
        found.append(replace(contender, entries=tuple(map(tuple, entries))))
    return found


@torch.no_grad()
def kept_masses(model: nn.Module, policy: Policy, sizes: Sequence[int], rows: torch.Tensor) -> dict[int, torch.Tensor]:
    """The share of each head's attention that falls on what it holds, by the size of all heads: [layers, H] fp64."""
    gated = find_gated_model(model)
    check_length(gated, rows.shape[1])
    device = gated.model.get_input_embeddings().weight.device
    at_a_time = max(1, tokens_at_a_time(gated, device) // (rows.shape[1] * len(sizes)))
    totals: torch.Tensor | None = None
    with evaluating(gated):
        for some in rows.to(device).split(at_a_time):
            caches = [_MassCache(gated, size, policy=policy, budgets="uniform") for size in sizes]
            cache = SimulatedCache.side_by_side(caches)
            model(
                input_ids=some.repeat(len(sizes), 1),
                past_key_values=cache,
                use_cache=True,
                last_hidden_state_only=True,
            )
            kept = torch.stack([layer.kept.cpu() for layer in cache.gated_layers], dim=1)  # [B, layers, H]
            kept = kept.unflatten(0, (len(sizes), len(some))).sum(1)
            totals = kept if totals is None else totals + kept
    assert totals is not None
    return dict(zip(sizes, totals / len(rows), strict=True))


def best_budgets(kept: dict[int, torch.Tensor], memory_size: int, least: int, alike: bool = False) -> Budgets:
    """Budgets [layers][heads] of memory_size in the mean, exactly, with the largest sum of kept masses.

    Between the sizes that were tried, a head's kept mass is taken to be the concave hull of the measured ones, so that
    the entries that add most can be given away first.

    Args:
        kept: [layers, heads] by size.
        least: entries that every head has.
        alike: the same for all heads of a layer.
    """
    sizes = sorted(kept)
    table = torch.stack([kept[size] for size in sizes]).double()  # [sizes, layers, heads]
    layers, heads = table.shape[1:]
    if alike:
        table = table.mean(2, keepdim=True)
    units = table.flatten(1).T.tolist()  # [layers * heads][sizes]
    budgets = [least] * len(units)
    rest = (memory_size - least) * len(units)
    gains = [
        (-slope, unit, first, last)
        for unit, masses in enumerate(units)
        for slope, first, last in _hull([(0, 0.0), *zip(sizes, masses, strict=True)])
    ]
    for _, unit, first, last in sorted(gains):
        more = min(rest, max(0, last - max(first, least)))
        budgets[unit] += more
        rest -= more
    for unit in range(len(units)):  # all have the largest size
        more = rest // (len(units) - unit)
        budgets[unit] += more
        rest -= more
    width = heads // table.shape[2]
    found = torch.tensor(budgets).view(layers, -1).repeat_interleave(width, dim=1)
    return found.tolist()


def _hull(points: list[tuple[int, float]]) -> list[tuple[float, int, int]]:
    """Slope, begin and end of each piece of the concave hull of points, by size."""
    corners: list[tuple[int, float]] = []
    for point in points:
        while len(corners) > 1 and _slope(corners[-2], corners[-1]) <= _slope(corners[-1], point):
            corners.pop()
        corners.append(point)
    return [(_slope(a, b), a[0], b[0]) for a, b in pairwise(corners)]


def _slope(one: tuple[int, float], other: tuple[int, float]) -> float:
    return (other[1] - one[1]) / (other[0] - one[0])


def _tried(model: nn.Module, policy: Policy, memory_sizes: Sequence[int]) -> list[int]:
    sizes = {max(int(step * size), _least(model, policy, size)) for step in STEPS for size in memory_sizes}
    return sorted(sizes)


def _least(model: nn.Module, policy: Policy, memory_size: int) -> int:
    protected = find_gated_model(model).active_config.protected_tokens if policy.keeps_sinks else 0
    return max(protected + 1, min(LEAST_CALIBRATED, memory_size))


def _is_alike(policy: Policy) -> bool:
    return isinstance(policy, FeedbackPolicy) and policy.same_for_all_heads


class _MassLayer(SimulatedLayer):
    """Notes how much of the attention to all tokens falls on those that are held: `kept`, fp64 [B, H]."""

    kept: torch.Tensor

    def attend(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        log_beta: Any,
        padding_mask: torch.Tensor | None,
        softmax: Softmax,
    ) -> torch.Tensor:
        output = super().attend(query, key, value, log_beta, padding_mask, softmax)
        assert self.eviction_times is not None
        self.kept = _kept(query, key, self.eviction_times, softmax)
        return output


def _kept(query: torch.Tensor, key: torch.Tensor, times: torch.Tensor, softmax: Softmax) -> torch.Tensor:
    heads, tokens = key.shape[1:3]
    position = torch.arange(tokens, device=key.device)
    total = torch.zeros(times.shape[:2], dtype=torch.float64, device=key.device)
    first = tokens // 2
    for start in range(first, tokens, QUERIES):
        steps = position[start : start + QUERIES, None]  # [n, 1]
        some = query[:, :, start : start + QUERIES]
        weights = entry_weights(some, key, (position <= steps)[None, None], softmax)  # [B, H, n, T]
        total += (weights * (steps < times[:, :, None])).double().sum((2, 3))
    return total / ((tokens - first) * query.shape[1] // heads)


class _MassCache(SimulatedCache):
    def make_layer(self, rule: EvictionRule, owner: nn.Module) -> SimulatedLayer:
        super().make_layer(rule, owner)  # refuses what a simulation cannot follow
        return _MassLayer(rule, owner)
