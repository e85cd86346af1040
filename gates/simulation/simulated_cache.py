"""A whole sequence in one forward pass, seen as a bounded cache would have shown it token by token."""

from collections.abc import Sequence
from dataclasses import replace
from itertools import groupby
from typing import Any

import torch
from torch import nn

from retention_gates.gates.attention.cache_layer import EvictingLayer
from retention_gates.gates.cache.evicting_cache import EvictingCache
from retention_gates.gates.policies import NewTokens, ScoredPolicy
from retention_gates.gates.policies.eviction_rule import EvictionRule
from retention_gates.gates.simulation.attention import attention_until
from retention_gates.gates.simulation.stepper import Stepper, run_side_by_side
from retention_gates.kernels.eviction_times import eviction_times
from retention_gates.kernels.gate_evict import GateOutput
from retention_gates.kernels.softmax import Softmax


class SimulatedLayer(EvictingLayer):
    """Finds out when each token goes, then attends to what each query would have seen.

    Rows of several rules may stand side by side: the batch is divided equally among them, in their order. After the
    forward pass `eviction_times` [B, H, T] has the step at which each token was no longer seen.
    """

    eviction_times: torch.Tensor | None = None

    def __init__(self, rule: EvictionRule, owner: nn.Module):
        super().__init__(rule, owner)
        self.others: list[EvictionRule] = []
        self.row_seeds: torch.Tensor | None = None  # int64, one for each of a rule's rows, instead of its own
        self.seen = 0
        self.steppers: dict[Any, Stepper] = {}  # shared by the layers of a cache

    @property
    def rules(self) -> list[EvictionRule]:
        return [self.rule, *self.others]

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        self.dtype, self.device, self.batch_size = key_states.dtype, key_states.device, key_states.shape[0]
        self.is_initialized = True

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if not self.is_empty:
            raise ValueError(
                "A SimulatedCache reads a whole sequence in one forward pass, and this one has read its own: call "
                "cache.reset() before the next. To generate, use BoundedCache."
            )
        if len(key_states) % len(self.rules):
            raise ValueError(
                f"This SimulatedCache has {len(self.rules)} caches side by side and got a batch of {len(key_states)}: "
                "repeat the rows once for each."
            )
        return super().update(key_states, value_states, *args, **kwargs)

    def attend(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        log_beta: torch.Tensor | GateOutput,
        padding_mask: torch.Tensor | None,
        softmax: Softmax,
    ) -> torch.Tensor:
        assert isinstance(log_beta, torch.Tensor)
        self.lazy_initialization(key, value)
        self.seen = key.shape[2]
        offset = torch.arange(self.seen, device=self.device).expand(self.batch_size, self.seen)
        if padding_mask is not None:  # of the whole sequence, which is new
            offset = offset - (padding_mask.cumsum(1) == 0).sum(1, keepdim=True)
        new = self.rule.new_tokens(log_beta, key, value, offset)
        self.eviction_times, merged = self._find_times(query, new, padding_mask, softmax)
        most_held = max(max(rule.sizes) for rule in self.rules) - 1
        output = attention_until(self.eviction_times, query, key, value, most_held, softmax)
        for rows, own_output in merged:
            output[rows] = own_output
        self.is_empty = self.is_attending = False
        return output

    @torch.no_grad()
    def _find_times(
        self, query: torch.Tensor, new: NewTokens, valid: torch.Tensor | None, softmax: Softmax
    ) -> tuple[torch.Tensor, list[tuple[slice, torch.Tensor]]]:
        """Eviction times [B, H, T] of all rules, and outputs [rows, HQ, T, Dv] where entries were merged."""
        share = self.batch_size // len(self.rules)
        found: list[
            tuple[slice, torch.Tensor | Stepper]
        ] = []  # of some rows the times, or the stepper that finds them
        steppers: list[Stepper] = []
        first = 0
        for _, group in groupby(self.rules, key=_kind):
            rules = list(group)
            rows = slice(first, first + share * len(rules))
            seed = new.seed if self.row_seeds is None else self.row_seeds.repeat(len(rules)).to(self.device)
            own = NewTokens(new.log_beta[rows], new.key[rows], new.value[rows], new.offset[rows], seed, new.layer)
            own_valid = None if valid is None else valid[rows]
            if isinstance(rules[0].policy, ScoredPolicy):
                found.append((rows, _times_known_ahead(rules, own, own_valid)))
            else:
                shapes = (query.shape, new.key.shape, new.value.shape, new.value.dtype)
                kind = (len(steppers), *shapes, valid is None, softmax.sinks is None)
                stepper = self._stepper(rules, softmax, kind)
                stepper.begin(query[rows], own, own_valid, softmax.sinks)
                steppers.append(stepper)
                found.append((rows, stepper))
            first = rows.stop
        results = dict(zip(steppers, run_side_by_side(steppers, query.shape[2]), strict=True))
        times, merged = [], []
        for rows, one in found:
            own_times, own_output = results[one] if isinstance(one, Stepper) else (one, None)
            times.append(own_times)
            if own_output is not None:
                merged.append((rows, own_output))
        return torch.cat(times), merged

    def _stepper(self, rules: list[EvictionRule], softmax: Softmax, kind: tuple[Any, ...]) -> Stepper:
        """That of the layer before, if it had the same rules and shapes."""
        key = tuple(replace(rule, layer=0) for rule in rules), softmax.scale, softmax.softcap, *kind
        if key not in self.steppers:
            self.steppers[key] = Stepper(rules, softmax)
        return self.steppers[key]

    def get_seq_length(self) -> int:
        return self.seen

    def restore(self, state: dict[str, torch.Tensor], columns: int) -> None:
        raise ValueError("A SimulatedCache holds nothing that a file could give back: load into a BoundedCache.")

    def memory_bytes(self) -> int:
        return 0

    def positions(self, head: int) -> torch.Tensor:
        raise ValueError(
            "A SimulatedCache holds no entries: eviction_times has the step at which each token is evicted."
        )

    def holds(self, span: tuple[int, int]) -> bool:
        """Pinning a sequence that has been read would change nothing any more."""
        return self.is_empty

    def reset(self) -> None:
        super().reset()
        self.seen, self.eviction_times = 0, None


def _kind(rule: EvictionRule) -> tuple:
    """Rules of one kind can be simulated side by side: they differ in their budgets only."""
    return rule.policy, rule.buffer_size, rule.protected, rule.seed, rule.interval, rule.is_shared, rule.reserved


def _times_known_ahead(rules: Sequence[EvictionRule], new: NewTokens, valid: torch.Tensor | None) -> torch.Tensor:
    """When each token goes, [B, H, T], for all rules of one policy: to the op, the heads of one are like others."""
    rule = rules[0]
    assert isinstance(rule.policy, ScoredPolicy)
    batch, heads, tokens = new.log_beta.shape
    rows = batch // len(rules)
    recents = [one for one in (other.recent(new.key.device) for other in rules) if one is not None]

    def beside(x: torch.Tensor) -> torch.Tensor:  # [B, H, T] -> [rows, rules * H, T]
        return x.view(len(rules), rows, heads, tokens).transpose(0, 1).reshape(rows, -1, tokens)

    times = eviction_times(
        beside(rule.policy.score(new).contiguous()),
        torch.tensor([budget for other in rules for budget in other.budgets], device=new.key.device),
        linear_in_age=rule.policy.linear_in_age,
        buffer_size=rule.buffer_size,
        protected=rule.is_protected(new.offset[:rows]),
        recent=torch.cat(recents) if recents else None,
        valid=None if valid is None else valid[:rows],
    )
    return times.view(rows, len(rules), heads, tokens).transpose(0, 1).reshape(batch, heads, tokens)


class SimulatedCache(EvictingCache):
    """Does what a BoundedCache with the same arguments would over a sequence fed token by token, in one forward pass.

    For measuring: what is held at each step is exactly what the step-by-step decode holds, given the same scores;
    outputs are equal up to rounding, and nothing is bounded. Pass it as past_key_values to one forward pass over the
    whole rows.
    """

    def make_layer(self, rule: EvictionRule, owner: nn.Module) -> EvictingLayer:
        if self.cache_dtype is not None:
            raise ValueError(f"cache_dtype={self.cache_dtype!r} is for BoundedCache: a simulation stores nothing.")
        if rule.is_pooled:
            raise ValueError(
                'budgets="global" moves entries between layers, which a simulation layer by layer cannot follow: use '
                'BoundedCache, or choose budgets="calibrated".'
            )
        return SimulatedLayer(rule, owner)

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        steppers: dict[Any, Stepper] = {}
        for layer in self.gated_layers:
            layer.steppers = steppers

    @classmethod
    def side_by_side(
        cls, caches: Sequence["SimulatedCache"], row_seeds: torch.Tensor | None = None
    ) -> "SimulatedCache":
        """Caches of one model as one: the batch is divided equally among them, in their order.

        Those of one policy share its steps if they come one after the other. They must be new, and become part of the
        result.

        Args:
            row_seeds: int64, for each row of a cache the seed of policies that draw by chance. None: the caches'.
        """
        first = caches[0]
        for layers in zip(*(cache.gated_layers for cache in caches), strict=True):
            layers[0].others = [layer.rule for layer in layers[1:]]
            layers[0].row_seeds = row_seeds
        return first

    def pin(self, start: int, stop: int) -> None:
        if any(layer.others for layer in self.gated_layers):
            raise ValueError(f"pin({start}, {stop}): pin in each of the caches before they stand side by side.")
        super().pin(start, stop)
