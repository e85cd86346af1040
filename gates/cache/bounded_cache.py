"""The cache of fixed size to pass as past_key_values."""

import copy
import os
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from transformers.cache_utils import DynamicSlidingWindowLayer, LinearAttentionLayer

from retention_gates.gates.adapter.families import text_config
from retention_gates.gates.adapter.model import find_gated_model
from retention_gates.gates.adapter.placement import check_room, device_of
from retention_gates.gates.attention.cache_layer import EvictingLayer, storage_bytes
from retention_gates.gates.cache.checks import check_integer, check_rows, row_bytes, why_rows_stay
from retention_gates.gates.cache.evicting_cache import EvictingCache
from retention_gates.gates.cache.feedback_layer import FeedbackSlotLayer
from retention_gates.gates.cache.pool_layer import PoolLayer
from retention_gates.gates.cache.quantized_layer import STORED, QuantizedSlotLayer
from retention_gates.gates.cache.saved_cache import load_memory, save_memory
from retention_gates.gates.cache.slot_layer import SlotLayer
from retention_gates.gates.cache.window_layer import WindowLayer
from retention_gates.gates.decode.step import DecodeStep
from retention_gates.gates.policies import FeedbackPolicy, ScoredPolicy
from retention_gates.gates.policies.eviction_rule import EvictionRule


class BoundedCache(EvictingCache):
    """A KV cache of fixed size: `model.generate(**inputs, past_key_values=BoundedCache(model, memory_size=512))`.

    Every KV head keeps the entries that its gate gives the longest life, in slots allocated at the first token and
    never more. One cache serves one batch, over as many calls as a conversation has turns; `reset` starts anew.

    A sequence may have 2^24 tokens, evicted ones included; the next is refused. Positions go on counting, and RoPE
    with them: transformers computes its angles for any position in fp32, off by up to position * frequency / 2^24
    radians (0.06 after a million tokens), and as the model's rope_type says beyond the lengths it was trained on. Keys
    stay rotated as they were when they entered.

    Method: TRIM-KV, "Cache What Lasts", arXiv 2512.03324.

    Args:
        model: a model with retention gates; the cache works with this one only.
        memory_size: entries kept per KV head, in the mean over all gated layers and heads.
        policy: "retention" (the trained gates), or a rival by its name in `POLICIES`, or a Policy of your own.
        budgets: "uniform"; "calibrated" (by the adapter's budget shares); "pyramid" (PyramidKV, less and less from the
            first layer to the last); "adaptive" (AdaKV: the KV heads of a layer hold memory_size entries each in the
            mean, divided anew at every eviction by the lowest priorities, and room is allocated for every
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
        graph: whether `generate` replays its decoding steps as one CUDA graph, captured at the third; no effect on
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
            raise ValueError("compile=True compiles the step that the graph captures: it needs graph=True.")
        super().__init__(model, memory_size, **options)
        base, slots = find_gated_model(model).model, self.slots

        def bytes_of(size: int) -> int:  # slots are in proportion to it, but for what protection adds
            return row_bytes(base, slots * size // memory_size)

        check_room("memory_size", memory_size, bytes_of, device_of(base), f"for one row of text ({slots:,} entries)")
        self.decode_step = DecodeStep(compile) if graph else None
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
            for where, name, tensor in states:  # where a captured step finds them
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
        """Frees a capture that reads slots or a rule of before."""
        if self.decode_step is not None:
            self.decode_step.forget()

    @property
    def slots(self) -> int:
        """Entries that one row has room for, over all gated layers and KV heads."""
        return sum(layer.slots for layer in self.gated_layers)

    def memory_bytes(self) -> int:
        """Bytes held now, by the slots and by the layers that transformers keeps."""
        return sum(
            layer.memory_bytes() if isinstance(layer, EvictingLayer) else storage_bytes(layer) for layer in self.layers
        )

    @property
    def why_rows_stay(self) -> str | None:
        """Why no row can be taken out of this cache and go on in another; None if it can."""
        return why_rows_stay(self.layers)

    def copy_row(self, row: int, other: "BoundedCache", other_row: int = 0) -> None:
        """Overwrites one row of the batch by a row of another cache, as `copy_rows` does several."""
        self.copy_rows([row], other, [other_row])

    def copy_rows(self, rows: Sequence[int], other: "BoundedCache", other_rows: Sequence[int]) -> None:
        """Overwrites rows of the batch by rows of another cache, whose texts then go on in this one.

        Rows need not be equally long: the next token of each has its own position, which the caller passes as
        position_ids. Both caches must have read something, so that their slots are allocated. Policies that are fed
        back want caches that have read equally many columns, see `begin_at`.

        Raises:
            ValueError: for caches that differ in model, budgets or what they protect, rows that do not exist, and
                layers or policies of which a row cannot be taken by itself.
        """
        check_rows(self.layers, other.layers, rows, other_rows)
        device = self.gated_layers[0].device
        to, source = torch.tensor(rows, device=device), torch.tensor(other_rows, device=device)
        for layer, other_layer in zip(self.gated_layers, other.gated_layers, strict=True):
            layer.copy_rows(to.to(layer.device), other_layer, source.to(layer.device))

    def begin_at(self, column: int) -> None:
        """Lets an empty cache begin at this column, as if so many columns of padding had been read.

        A text that is read from there can join a batch that has come so far, by `copy_rows`.

        Raises:
            ValueError: for a cache that has read something, or whose rows cannot be copied.
        """
        check_integer("column", column, least=0)
        if not self.is_empty:
            raise ValueError(
                f"begin_at({column}): the cache has read {self.gated_layers[0].columns} tokens. Call cache.reset() "
                "before."
            )
        if self.why_rows_stay is not None:
            raise ValueError(f"begin_at({column}) is for caches whose rows can be copied: {self.why_rows_stay}.")
        for layer in self.gated_layers:
            layer.begin_at(column)

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
