"""What the layers of our caches have in common."""

import weakref
from dataclasses import replace

import torch
from torch import nn

from retention_gates.gates.cache_layer import GatedCacheLayer
from retention_gates.gates.eviction_rule import MOST_TOKENS, EvictionRule
from retention_gates.gates.policies import FeedbackPolicy
from retention_gates.kernels.gate_evict import GateOutput


class RuledLayer(GatedCacheLayer):
    """A cache layer that evicts by a rule: whose it is, what is staged, and what cannot be done with it."""

    is_compileable = False
    is_croppable = False
    is_sliding = False
    supports_early_init = False

    def __init__(self, rule: EvictionRule, owner: nn.Module):
        super().__init__()
        self.rule = rule
        self.owner = weakref.ref(owner)  # a copy of the cache must not copy the model
        self.is_empty = True  # known without asking the device
        self.is_attending = False
        self.staged: tuple[torch.Tensor | GateOutput, torch.Tensor | None] | None = None
        self.adapter = getattr(owner, "active_gate_name", None)
        self.passes = 0  # forward passes begun, counted without asking the device
        self.columns = 0  # read so far, counted like that

    def set_rule(self, budgets: tuple[int, ...], protected: tuple[tuple[int, int], ...]) -> None:
        """Changes what the rule protects and, while the layer is empty, the budgets."""
        assert self.is_empty or budgets == self.rule.budgets
        self.rule = replace(self.rule, budgets=budgets, protected=protected)

    def stage(self, module: nn.Module, log_beta: torch.Tensor | GateOutput, padding_mask: torch.Tensor | None) -> None:
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
        self.staged = (log_beta, padding_mask)

    def check_count(self, tokens: int) -> None:
        """Raises ValueError if so many tokens more are too many; known on the host, without asking the device."""
        if self.columns + tokens > MOST_TOKENS:
            raise ValueError(
                f"This cache has read {self.columns} tokens, and {tokens} more would pass {MOST_TOKENS}, beyond which "
                "ages are no whole numbers in fp32: call cache.reset() and start a new sequence."
            )

    def take_staged(self, tokens: int) -> tuple[torch.Tensor | GateOutput, torch.Tensor | None]:
        """What was staged for this forward pass: log_beta [B, H, T] or a gate to finish, and the padding mask or None.

        The mask is [B, S], and its last T columns are new.

        Args:
            tokens: T.

        Raises:
            ValueError: for too many tokens, if no gate ran, and if the policy needs an instruction that nobody pinned.
        """
        if not torch.compiler.is_compiling():
            self.check_count(tokens)
        if self.staged is None:
            raise ValueError(
                "This cache got keys but its layer's gate did not see them: the gates are off (disable_adapter), "
                "another model uses the cache, or a layer was called without its wrapper. Switch the gates on, or "
                "pass past_key_values=transformers.DynamicCache()."
            )
        staged, self.staged = self.staged, None
        policy = self.rule.policy
        if isinstance(policy, FeedbackPolicy) and policy.needs_instruction and not self.rule.instruction:
            raise ValueError(
                f"policy={policy.name!r} keeps what an instruction attends to, and there is none: call "
                "cache.pin(start, stop) for the instruction's tokens before they are read."
            )
        self.is_attending = True
        if not torch.compiler.is_compiling():  # a compiled step would be compiled for every number: counted outside
            self.passes += 1
            self.columns += tokens
        return staged

    def get_max_length(self) -> int:
        return -1  # bounded in entries, not in tokens

    def reset(self) -> None:
        """Forgets all tokens; what is allocated and what is pinned stay."""
        self.is_empty, self.is_attending, self.staged, self.passes, self.columns = True, False, None, 0, 0

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
