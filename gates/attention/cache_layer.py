"""The cache of one gated attention layer, as the wrapper and the attention function see it."""

import weakref
from abc import abstractmethod
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from transformers.cache_utils import CacheLayerMixin

from retention_gates.gates.policies import FeedbackPolicy
from retention_gates.gates.policies.eviction_rule import MOST_TOKENS, EvictionRule, Span
from retention_gates.kernels.gate_evict import GateOutput
from retention_gates.kernels.softmax import Softmax


class EvictingLayer(CacheLayerMixin):
    """A cache layer that decides by a rule which entries a query sees.

    Every forward pass of a layer makes three calls, in this order: the wrapper around the attention module calls
    `begin`, transformers' `Cache.update` calls `update`, and the registered attention function calls `attend`. The
    first two only check; keys, values, log_beta and the padding mask arrive together as arguments of `attend`.

    Args:
        rule: what is kept.
        owner: the wrapper whose entries these are.
    """

    is_compileable = False
    is_croppable = False
    is_sliding = False
    supports_early_init = False
    takes_gate_output = False  # whether `attend` takes one token's gate without its output layer
    row_state: tuple[str, ...] = ()  # names of the tensors with one row per sequence of the batch

    def __init__(self, rule: EvictionRule, owner: nn.Module):
        super().__init__()
        self.rule = rule
        self.owner = weakref.ref(owner)  # a copy of the cache must not copy the model
        self.adapter = getattr(owner, "active_gate_name", None)
        self.is_empty = True  # known without asking the device
        self.is_awaited = False  # whether the gate has run and keys are to come
        self.is_attending = False  # whether keys have come and attention is to follow
        self.passes = 0  # forward passes begun, counted without asking the device
        self.columns = 0  # tokens read so far, counted like that

    # ---- one forward pass ----

    def begin(self, module: nn.Module, tokens: int) -> None:
        """Checks that a pass of so many tokens may begin in the wrapper `module`.

        Raises:
            ValueError: for another model or adapter, after a pass that broke off, and for too many tokens.
        """
        if module is not self.owner():
            raise ValueError(
                "This cache was made for another model, and a cache holds the keys of one: make one for this model, "
                "BoundedCache(model, memory_size=...)."
            )
        if self.adapter != getattr(module, "active_gate_name", None):
            raise ValueError(
                f"This cache was made for the adapter {self.adapter!r} and another is active: switch back with "
                "model.set_adapter, or make a new BoundedCache."
            )
        if self.is_attending:
            raise ValueError(
                "The last forward pass with this cache broke off in the middle, so that its layers do not agree: call "
                "cache.reset() and start the sequence again."
            )
        if not torch.compiler.is_compiling():
            self.check_count(tokens)
        self.is_awaited = True

    def check_count(self, tokens: int) -> None:
        """Raises ValueError if so many tokens more are too many; known on the host, without asking the device."""
        if self.columns + tokens > MOST_TOKENS:
            raise ValueError(
                f"This cache has read {self.columns} tokens, and {tokens} more would pass {MOST_TOKENS}, beyond which "
                "ages are no whole numbers in fp32: call cache.reset() and start a new sequence."
            )

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns the new keys and values as they are; `attend` takes them in.

        Raises:
            ValueError: if the wrapper did not begin a pass, and for a policy whose instruction was not pinned.
        """
        if not self.is_awaited:
            raise ValueError(
                "This cache got keys but its layer's gate did not see them: the gates are off (disable_adapter), "
                "another model uses the cache, or a layer was called without its wrapper. Switch the gates on, or "
                "pass past_key_values=transformers.DynamicCache()."
            )
        policy = self.rule.policy
        if isinstance(policy, FeedbackPolicy) and policy.needs_instruction and not self.rule.instruction:
            raise ValueError(
                f"policy={policy.name!r} keeps what an instruction attends to, and there is none: call "
                "cache.pin(start, stop) for the instruction's tokens before they are read."
            )
        self.is_awaited, self.is_attending = False, True
        if not torch.compiler.is_compiling():  # a compiled step would be compiled for every number: counted outside
            self.passes += 1
            self.count(key_states.shape[2])
        return key_states, value_states

    def count(self, tokens: int) -> None:
        """Counts tokens that the layer reads, on the host."""
        self.columns += tokens

    @property
    def step_kind(self) -> Any:
        """Names how the next step of one token differs from others; None if all are alike."""
        return None

    @abstractmethod
    def attend(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        log_beta: torch.Tensor | GateOutput,
        padding_mask: torch.Tensor | None,
        softmax: Softmax,
    ) -> torch.Tensor:
        """Plain attention of the new queries over what is held and what is new, [B, HQ, T, Dv]; then evicts.

        Args:
            query: [B, HQ, T, D], the new tokens.
            key, value: the new entries, [B, H, T, D] and [B, H, T, Dv].
            log_beta: [B, H, T] fp32, or of one token what is left of the gate to compute if `takes_gate_output`.
            padding_mask: [B, S] bool, False for padding, S >= T; its last T columns are the new tokens, those before
                them the past. None if all are real.
        """

    # ---- what can be done with it ----

    @property
    def why_not_captured(self) -> str | None:
        """Why a step of this layer cannot be captured in a CUDA graph; None if it can."""
        return None

    @property
    def constants(self) -> list[Any]:
        """Objects beside the layer's own state whose tensors a captured step reads."""
        return []

    @property
    def why_rows_stay(self) -> str | None:
        """Why a row cannot be taken out of this layer and go on in another; None if it can."""
        return f"a {type(self).__name__} has no rows of its own"

    @property
    def why_rows_keep_columns(self) -> str | None:
        """Why a row can go on only in a layer that has read as many columns as its own; None if in any."""
        return None

    @property
    def step_period(self) -> int:
        """Columns after which steps do the same again: a row evicts as it does alone if it starts at a multiple."""
        return 1

    def copy_rows(self, rows: torch.Tensor, other: Any, other_rows: torch.Tensor) -> None:
        """Overwrites these rows, int64 [n], each by a row of another layer like this one.

        Raises:
            ValueError: where rows cannot be copied.
        """
        raise ValueError(f"A row cannot be copied: {self.why_rows_stay}.")

    def begin_at(self, column: int) -> None:
        """Lets an empty layer begin at this column, as if so many of padding had been read.

        Raises:
            ValueError: for layers whose rows cannot be copied.
        """
        raise ValueError(f"A cache begins at a column above 0 where its rows can be copied: {self.why_rows_stay}.")

    def saved_state(self) -> dict[str, torch.Tensor]:
        """Tensors by name that a memory file holds of this layer."""
        return {name: getattr(self, name) for name in self.row_state}

    def check_saved(self, name: str, state: dict[str, torch.Tensor], columns: int) -> list[str]:
        """Describes the faults of a `saved_state` from a file, after so many columns; messages call it `name`."""
        return []

    @abstractmethod
    def restore(self, state: dict[str, torch.Tensor], columns: int) -> None:
        """Takes over a `saved_state` of any number of rows, as after so many columns read in one pass."""

    @abstractmethod
    def memory_bytes(self) -> int:
        """Bytes that the layer's tensors hold now."""

    @abstractmethod
    def positions(self, head: int) -> torch.Tensor:
        """Positions that a KV head holds between two steps, [B, S] ascending, -1 where it holds fewer than S."""

    @abstractmethod
    def holds(self, span: Span) -> bool:
        """Whether every head of every row still holds all tokens of the span that it has seen."""

    def set_rule(self, budgets: tuple[int, ...], protected: tuple[Span, ...]) -> None:
        """Changes what the rule protects and, while the layer is empty, the budgets."""
        assert self.is_empty or budgets == self.rule.budgets
        self.rule = replace(self.rule, budgets=budgets, protected=protected)

    def check_head(self, head: int) -> None:
        """Raises ValueError for a KV head that the layer does not have."""
        if not 0 <= head < len(self.rule.budgets):
            raise ValueError(f"head={head} must be one of the layer's {len(self.rule.budgets)} KV heads, from 0.")

    # ---- what transformers calls ----

    def get_max_length(self) -> int:
        return -1  # bounded in entries, not in tokens

    def get_mask_sizes(self, query_length: int) -> tuple[Any, int]:
        return self.get_seq_length() + query_length, 0

    def reset(self) -> None:
        """Forgets all tokens; what is allocated and what is pinned stay."""
        self.is_empty, self.is_awaited, self.is_attending, self.passes, self.columns = True, False, False, 0, 0

    def crop(self, tokens_to_remove: int) -> None:
        if tokens_to_remove != 0:
            raise ValueError(
                f"crop({tokens_to_remove}): a cache that evicts cannot go back, what was there is overwritten. Take a "
                "copy.deepcopy of the cache before the tokens that you may want to remove."
            )

    def activate_past_recording(self) -> None:
        raise ValueError(
            "Assisted, prompt-lookup and speculative decoding roll the cache back, and a cache that evicts cannot go "
            "back: generate without them."
        )


def storage_bytes(layer: Any) -> int:
    """Bytes of all tensors that are attributes of a layer of transformers, or values of a dict that is one."""
    held = [value for value in vars(layer).values() if not isinstance(value, dict)]
    held += [value for states in vars(layer).values() if isinstance(states, dict) for value in states.values()]
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage() for t in held if isinstance(t, torch.Tensor)}
    return sum(storage.nbytes() for storage in storages.values())
