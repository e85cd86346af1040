"""The caches to pass as past_key_values: one of fixed size, and what it shares with the simulated one."""

import copy
import os
import weakref
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from transformers import DynamicCache
from transformers.cache_utils import Cache, DynamicSlidingWindowLayer, LinearAttentionLayer

from retention_gates.gates.budgets import (
    BUDGETS,
    LEAST_CALIBRATED,
    Budgets,
    calibrated_budgets,
    pyramid_budgets,
    uniform_budgets,
)
from retention_gates.gates.cache_checks import (
    check_heads,
    check_integer,
    check_rows,
    checked_budgets,
    checked_reserves,
)
from retention_gates.gates.cache_layer import EvictingLayer, storage_bytes
from retention_gates.gates.decode_graph import DecodeGraph
from retention_gates.gates.eviction_rule import EvictionRule, Reserve, Span, count_offsets, count_reserved
from retention_gates.gates.families import text_config
from retention_gates.gates.feedback_layer import FeedbackSlotLayer
from retention_gates.gates.memory_file import load_memory, save_memory
from retention_gates.gates.model import find_gated_model
from retention_gates.gates.policies import FeedbackPolicy, Policy, ScoredPolicy, as_feedback, find_policy
from retention_gates.gates.pool import Pool
from retention_gates.gates.pool_layer import PoolLayer
from retention_gates.gates.quantized_slots import STORED, QuantizedSlotLayer
from retention_gates.gates.rotation import rotary_frequencies
from retention_gates.gates.slot_layer import SlotLayer
from retention_gates.gates.window_layer import WindowLayer


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
        check_integer("seed", seed, least=0, most=2**32 - 1)
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
        self.gated_layers = [layers[layer] for layer in owners]  # those that evict, in order

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
        protected = (*self.protected, (start, stop))
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
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args, **kwargs
    ) -> tuple[torch.Tensor, torch.Tensor]:
        self._check_batch(key_states)
        if not torch.compiler.is_compiling():
            self._check_passes(layer_idx)
        return super().update(key_states, value_states, layer_idx, *args, **kwargs)

    def update_conv_state(self, conv_states: torch.Tensor, layer_idx: int, *args, **kwargs) -> torch.Tensor:
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

    def crop(self, tokens_to_remove: int) -> None:
        for layer in self.gated_layers:  # before a layer of transformers has lost anything
            layer.crop(tokens_to_remove)

    def activate_past_recording(self) -> None:
        for layer in self.gated_layers:
            layer.activate_past_recording()


class BoundedCache(EvictingCache):
    """A KV cache of fixed size: `model.generate(**inputs, past_key_values=BoundedCache(model, memory_size=512))`.

    Every KV head keeps the entries that its gate gives the longest life, in slots allocated at the first token and
    never more. One cache serves one batch, over as many calls as a conversation has turns; `reset` starts anew.

    A sequence may have 2^24 tokens, evicted ones included; the next is refused. Positions go on counting, and RoPE
    with them: transformers computes its angles for any position in fp32, off by up to position * frequency / 2^24
    radians (0.06 after a million tokens), and as the model's rope_type says beyond the lengths it was trained on. Keys
    stay turned as they were when they entered.

    Method: TRIM-KV, "Cache What Lasts", arXiv 2512.03324.

    Args:
        model: a model with retention gates; the cache works with this one only.
        memory_size: entries kept per KV head, in the mean over all gated layers and heads.
        policy: "retention" (the trained gates), or a rival by its name in `POLICIES`, or a Policy of your own.
        budgets: "uniform"; "calibrated" (by the adapter's budget shares); "pyramid" (PyramidKV, less and less from the
            first layer to the last); "adaptive" (AdaKV: the KV heads of a layer hold memory_size entries each in the
            mean, divided anew at every eviction by who has the lowest priorities, and room is allocated for every
            division); "global" (DBTrimKV: as adaptive, of all layers, in one pool with room for the mean; for policies
            known ahead); or the entries of every gated layer and KV head, [layers][heads]. None: "calibrated" if the
            adapter has shares, else "uniform".
        protected_tokens: leading tokens of each row that are never evicted, counted in every head's budget. None: as
            many as the adapter was trained with, and none for the policy "sliding_window".
        buffer_size: entries above its budget that a head may collect before it evicts as many at once.
        seed: of the policy "random", below 2^32.
        reserved: spans with a budget of their own, (start, stop, entries): of the tokens start..stop-1, counted like
            pinned ones, every head keeps at least so many, the best ones, inside its budget. A prompt of several
            instructions can so be kept from forgetting one of them while all compete for the rest.
        cache_dtype: "int8" or "fp8" (e4m3) holds keys and values in 8 bits, each entry with a scale of its own; for
            policies known ahead. None: as the model makes them.
        graph: whether `generate` replays its decoding steps as one CUDA graph, recorded at the third; no effect on
            other devices.
        compile: whether a step goes through torch.compile before, which takes a minute or two at the first time and
            joins the model's small operators. On a CPU that needs a C++ compiler.

    Raises:
        ValueError: for sizes that leave no room, unknown names, and a model without gates.
    """

    def __init__(
        self, model: nn.Module, memory_size: int, *, graph: bool = True, compile: bool = False, **options: Any
    ):
        for name, value in (("graph", graph), ("compile", compile)):
            if not isinstance(value, bool):
                raise ValueError(f"{name}={value!r} must be True or False.")
        if compile and not graph:
            raise ValueError("compile=True compiles the step that the graph records: it needs graph=True.")
        super().__init__(model, memory_size, **options)
        self.decode_graph = DecodeGraph(compile) if graph else None
        kinds = getattr(text_config(find_gated_model(model).model), "layer_types", None) or ()
        for index, layer in enumerate(self.layers):
            if type(layer) is DynamicSlidingWindowLayer and "chunked_attention" not in kinds:
                self.layers[index] = WindowLayer(layer.sliding_window)

    def make_layer(self, rule: EvictionRule, owner: nn.Module) -> EvictingLayer:
        if self.cache_dtype is not None:
            if self.cache_dtype not in STORED:
                raise ValueError(
                    f"cache_dtype={self.cache_dtype!r} is unknown: choose {' or '.join(map(repr, STORED))}, or None "
                    "for keys and values as the model makes them."
                )
            if rule.is_pooled or not isinstance(rule.policy, ScoredPolicy):
                raise ValueError(
                    f"cache_dtype={self.cache_dtype!r} goes with policies known ahead and budgets of each head, not "
                    f"with policy={rule.policy.name!r} and budgets={self.budgets_from!r}, or reserved spans: leave it "
                    "out."
                )
            return QuantizedSlotLayer(rule, owner, self.cache_dtype)
        if rule.is_pooled:
            return PoolLayer(rule, owner)
        return (FeedbackSlotLayer if isinstance(rule.policy, FeedbackPolicy) else SlotLayer)(rule, owner)

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        for layer in self.layers:
            states = _states(layer) if isinstance(layer, LinearAttentionLayer) else []
            layer.reorder_cache(beam_idx)
            for where, name, tensor in states:  # where a recorded step finds them
                where[name] = tensor.copy_(where[name])

    def batch_repeat_interleave(self, repeats: int) -> None:
        super().batch_repeat_interleave(repeats)
        self._forget_graph()

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        super().batch_select_indices(indices)
        self._forget_graph()

    def pin(self, start: int, stop: int) -> None:
        super().pin(start, stop)
        self._forget_graph()

    def _forget_graph(self) -> None:
        """Frees a recording that reads slots or a rule of before."""
        if self.decode_graph is not None:
            self.decode_graph.forget()

    @property
    def slots(self) -> int:
        """Entries that one row has room for, over all gated layers and KV heads."""
        return sum(layer.slots for layer in self.gated_layers)

    def memory_bytes(self) -> int:
        """Bytes held now, by the slots and by the layers that transformers keeps."""
        return sum(
            layer.memory_bytes() if isinstance(layer, EvictingLayer) else storage_bytes(layer) for layer in self.layers
        )

    def copy_row(self, row: int, other: "BoundedCache", other_row: int = 0) -> None:
        """Overwrites one row of the batch by a row of another cache, whose text then goes on in this one.

        Rows need not be equally long: the next token of each has its own position, which the caller passes as
        position_ids. Both caches must have read something, so that their slots are allocated.

        Raises:
            ValueError: for caches that differ in model, budgets or what they protect, rows that do not exist, and
                layers or policies of which a row cannot be taken by itself.
        """
        check_rows(self.layers, other.layers, row, other_row)
        for layer, source in zip(self.gated_layers, other.gated_layers, strict=True):
            layer.copy_row(row, source, other_row)

    def fork(self) -> "BoundedCache":
        """A copy of its own, so that one memory can be asked many questions: ask each of another fork."""
        return copy.deepcopy(self)

    def save(self, path: str | os.PathLike) -> None:
        """Writes the memory to one safetensors file, which names the model, the adapter and the rule of the cache.

        Raises:
            ValueError: if nothing has been read, for a policy of your own, for a model whose other layers cannot be
                saved, and for a path that cannot be a file.
        """
        gated = self._model()
        if gated is None:
            raise ValueError("The model of this cache is gone, and a memory file must name it: save before it goes.")
        save_memory(self, gated, path)

    @classmethod
    def load(
        cls,
        model: nn.Module,
        path: str | os.PathLike,
        *,
        memory_size: int | None = None,
        policy: str | None = None,
        budgets: str | None = None,
        cache_dtype: str | None = None,
    ) -> "BoundedCache":
        """The cache that was saved in the file; it goes on as if the text had been read just now.

        Nothing of the file is run, and all of it is checked before it is used.

        Args:
            model: the model that the memory was made with, its gates included.
            memory_size, policy, budgets, cache_dtype: what the memory must have been made with; None takes what it
                was, so that a cache_dtype of None is not asked for.

        Raises:
            ValueError: for a memory of another model, other gates, other budgets or another dtype, naming both; and
                for a file that is damaged or says what cannot be.
        """
        wanted = {"memory_size": memory_size, "policy": policy, "budgets_from": budgets, "cache_dtype": cache_dtype}
        return load_memory(cls, model, path, **wanted)


def _states(layer: LinearAttentionLayer) -> list[tuple[dict, int, torch.Tensor]]:
    """Where the layer keeps its tensors: dict, key and tensor."""
    kinds = (layer.conv_states, layer.recurrent_states)
    return [(states, key, state) for states in kinds for key, state in states.items() if state is not None]
