"""The base of caches that evict by a rule: the bounded one and the simulated one."""

import weakref
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from transformers import DynamicCache
from transformers.cache_utils import Cache

from retention_gates.gates.adapter.families import text_config
from retention_gates.gates.adapter.model import find_gated_model
from retention_gates.gates.attention.cache_layer import EvictingLayer
from retention_gates.gates.cache.budgets import (
    BUDGETS,
    LEAST_CALIBRATED,
    Budgets,
    calibrated_budgets,
    pyramid_budgets,
    uniform_budgets,
)
from retention_gates.gates.cache.checks import check_heads, check_integer, checked_budgets, checked_reserves
from retention_gates.gates.cache.pool import Pool
from retention_gates.gates.cache.rotary_frequencies import rotary_frequencies
from retention_gates.gates.policies import FeedbackPolicy, Policy, ScoredPolicy, as_feedback, find_policy
from retention_gates.gates.policies.eviction_rule import (
    MOST_SEED,
    MOST_SPANS,
    EvictionRule,
    Reserve,
    Span,
    count_offsets,
    count_reserved,
    merged_spans,
)


class EvictingCache(Cache):
    """A cache whose gated layers evict by a rule; every other layer has the cache that transformers gives it."""

    def make_layer(self, rule: EvictionRule, owner: nn.Module) -> EvictingLayer:
        """The cache layer that follows the rule for the gated attention module `owner`."""
        raise NotImplementedError

    def __init__(
        self,
        model: nn.Module,
        memory_size: int,
        *,
        policy: str | Policy = "retention",
        budgets: str | Budgets | None = None,
        protected_tokens: int | None = None,
        buffer_size: int = 1,
        seed: int = 0,
        reserved: Sequence[Reserve] = (),
        cache_dtype: str | None = None,
    ):
        gated = find_gated_model(model)
        config = gated.active_config
        owners = {wrapper.layer_idx: wrapper for wrapper in gated.gated_layers}
        chosen = find_policy(policy)
        if protected_tokens is None:
            protected_tokens = config.protected_tokens if chosen.keeps_sinks else 0
        check_integer("memory_size", memory_size, least=1)
        check_integer("protected_tokens", protected_tokens, least=0)
        check_integer("buffer_size", buffer_size, least=1)
        check_integer("seed", seed, least=0, most=MOST_SEED)
        self.reserved = checked_reserves(reserved)
        self.cache_dtype = cache_dtype
        self.memory_size = memory_size
        self.budgets_from: str | Budgets
        self.budgets_from = ("calibrated" if config.budget_shares else "uniform") if budgets is None else budgets
        assert config.num_key_value_heads is not None
        self.budget_shares = config.budget_shares
        self._model = weakref.ref(gated)  # a copy of the cache must not copy the model
        self._shape = (len(owners), config.num_key_value_heads)
        self.protected: tuple[Span, ...] = ((0, protected_tokens),)
        is_shared, is_pooled = self.budgets_from == "adaptive", self.budgets_from == "global"
        if is_shared or reserved:
            chosen = as_feedback(chosen)
        needs_rotation = isinstance(chosen, FeedbackPolicy) and chosen.needs_rotation
        frequencies = rotary_frequencies(gated.model, chosen.name) if needs_rotation else ()
        layers: list[Any] = DynamicCache(config=text_config(gated.model)).layers
        for (layer, owner), row in zip(owners.items(), self._budgets(self.protected), strict=True):
            rule = EvictionRule(
                chosen,
                tuple(row),
                buffer_size,
                self.protected,
                seed,
                layer,
                frequencies,
                is_shared,
                self.reserved,
                is_pooled,
            )
            check_heads(rule)
            layers[layer] = self.make_layer(rule, owner)
        if is_pooled and isinstance(chosen, ScoredPolicy):
            pool = Pool(*self._shape, memory_size, buffer_size, chosen.linear_in_age)
            for index, layer in enumerate(owners):
                layers[layer].join(pool, index)
        super().__init__(layers=layers)
        self.text_digest: tuple[int, str] | None = None  # of the tokens that were read, as far as `generate` knows it
        self.gated_layers = [layers[layer] for layer in owners]  # those that evict, in order

    def __repr__(self) -> str:
        rule, first = self.gated_layers[0].rule, self.gated_layers[0]
        budgets = self.budgets_from if isinstance(self.budgets_from, str) else "lists"
        rows = f"{first.batch_size} rows, {first.columns} tokens read" if first.is_initialized else "nothing read"
        return (
            f"{type(self).__name__}(memory_size={self.memory_size}, policy={rule.policy.name!r}, budgets={budgets!r}, "
            f"{len(self.gated_layers)} of {len(self.layers)} layers evict; {rows})"
        )

    @property
    def budgets(self) -> Budgets:
        """Entries that every gated layer and KV head keeps."""
        return [list(layer.rule.budgets) for layer in self.gated_layers]

    @property
    def is_empty(self) -> bool:
        """Whether no token has been seen."""
        return all(layer.is_empty for layer in self.gated_layers)

    def _budgets(self, protected: tuple[Span, ...]) -> Budgets:
        """The budgets that were asked for, with room in every head for a token beside those that must stay."""
        layers, heads = self._shape
        least = count_offsets(protected) + count_reserved(self.reserved) + 1
        if self.memory_size < least:
            raise ValueError(
                f"memory_size={self.memory_size} must be at least {least}, for {least - 1} protected tokens and one "
                "more: raise it, or protect, pin and reserve fewer tokens."
            )
        if self.budgets_from in ("uniform", "adaptive", "global"):
            return uniform_budgets(layers, heads, self.memory_size)
        if self.budgets_from == "pyramid":
            return pyramid_budgets(layers, heads, self.memory_size, least)
        if self.budgets_from == "calibrated":
            if not self.budget_shares:
                raise ValueError(
                    'budgets="calibrated" needs budget shares, which the adapter does not have: run `retention-gates '
                    'calibrate` on it, or choose budgets="uniform".'
                )
            floor = max(least, min(LEAST_CALIBRATED, self.memory_size))
            return calibrated_budgets(self.budget_shares, self.memory_size, floor)
        if not isinstance(self.budgets_from, list) or not all(isinstance(row, list) for row in self.budgets_from):
            raise ValueError(
                f"budgets={self.budgets_from!r} is unknown: choose {', '.join(map(repr, BUDGETS))} or lists "
                "[layers][heads]."
            )
        return checked_budgets(self.budgets_from, layers, heads, self.memory_size, least)

    def pin(self, start: int, stop: int) -> None:
        """Keeps the tokens start..stop-1 of every row for good, a system prompt say; they count in every budget.

        Counted from each row's first real token, so that left padding makes no difference. Before the first token,
        calibrated budgets are fitted anew so that every head has room; later the budgets stay.

        Raises:
            ValueError: if a head has no room for them beside what is protected already and one token more, or if a
                head has evicted one of them.
        """
        check_integer("start", start, least=0)
        check_integer("stop", stop, least=start + 1)
        protected = (self.protected[0], *merged_spans([*self.protected[1:], (start, stop)]))
        if len(protected) > MOST_SPANS:
            raise ValueError(
                f"pin({start}, {stop}): {len(protected)} spans that do not touch would be protected, and at most "
                f"{MOST_SPANS} may be: every token is compared with each. Pin fewer, longer spans."
            )
        budgets = self._budgets(protected) if self.is_empty else self.budgets
        least = count_offsets(protected) + count_reserved(self.reserved) + 1
        smallest = min(min(row) for row in budgets)
        if smallest < least:
            raise ValueError(
                f"pin({start}, {stop}): for {least - 1} protected tokens every KV head needs {least} entries; one has "
                f"{smallest}. Pin before the first token, raise memory_size, or pin fewer tokens."
            )
        for layer in self.gated_layers:
            if not layer.holds((start, stop)):
                raise ValueError(
                    f"pin({start}, {stop}): layer {layer.rule.layer} has evicted some of these tokens. Pin them "
                    "before they are read, or right after."
                )
        for layer, row in zip(self.gated_layers, budgets, strict=True):
            layer.set_rule(tuple(row), protected)
        self.protected = protected

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        self._check_batch(key_states)
        if not torch.compiler.is_compiling():
            self._check_passes(layer_idx)
        return super().update(key_states, value_states, layer_idx, *args, **kwargs)

    def update_conv_state(self, conv_states: torch.Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> torch.Tensor:
        self._check_batch(conv_states)
        return super().update_conv_state(conv_states, layer_idx, *args, **kwargs)

    def _check_passes(self, layer_idx: int) -> None:
        """All layers must have begun equally many passes when the first begins another."""
        first = self.gated_layers[0]
        begins = layer_idx == first.rule.layer and first.is_awaited
        if begins and any(layer.passes != first.passes for layer in self.gated_layers):
            raise ValueError(
                "The last forward pass with this cache broke off between two layers, so that they do not agree: call "
                "cache.reset() and start the sequence again."
            )

    def _check_batch(self, states: torch.Tensor) -> None:
        allocated = next((layer.batch_size for layer in self.gated_layers if layer.is_initialized), None)
        if allocated not in (None, states.shape[0]):
            raise ValueError(
                f"This cache was allocated for a batch of {allocated} and got one of {states.shape[0]}: make a "
                "new one, or change it with cache.batch_repeat_interleave(n) or cache.batch_select_indices(rows)."
            )

    def get_max_length(self, layer_idx: int | None = None) -> int:
        return -1 if layer_idx is None else super().get_max_length(layer_idx)

    def reset(self) -> None:
        super().reset()
        self.text_digest = None

    def crop(self, tokens_to_remove: int) -> None:
        for layer in self.gated_layers:  # before a layer of transformers has lost anything
            layer.crop(tokens_to_remove)

    def activate_past_recording(self) -> None:
        for layer in self.gated_layers:
            layer.activate_past_recording()
