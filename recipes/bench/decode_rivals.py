"""The caches that decoding is measured against."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from peft import PeftModel
from torch import Tensor, nn

from retention_gates import find_gated_model
from retention_gates.gates.attention.cache_argument import find_cache
from retention_gates.gates.attention.cache_layer import EvictingLayer, storage_bytes
from retention_gates.gates.cache.evicting_cache import EvictingCache
from retention_gates.gates.policies.eviction_rule import EvictionRule, Span
from retention_gates.kernels.softmax import Softmax


class EagerLayer(EvictingLayer):
    """Learned eviction as operators of eager torch: concatenate, and once in `buffer_size` steps choose and gather."""

    keys: Tensor
    values: Tensor
    seen = 0

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.batch_size, heads = key_states.shape[:2]
        self.keys, self.values = key_states[:, :, :0], value_states[:, :, :0]
        self.log_beta = torch.zeros(self.batch_size, heads, 0, device=key_states.device)
        self.held_positions = self.log_beta.long()
        self.is_initialized = True

    def attend(
        self, query: Tensor, key: Tensor, value: Tensor, log_beta: Any, padding_mask: Tensor | None, softmax: Softmax
    ) -> Tensor:
        if not self.is_initialized:
            self.lazy_initialization(key, value)
        tokens = key.shape[2]
        new = torch.arange(self.seen, self.seen + tokens, device=key.device).expand_as(log_beta)
        self.keys = torch.cat([self.keys, key], dim=2)
        self.values = torch.cat([self.values, value], dim=2)
        self.log_beta = torch.cat([self.log_beta, log_beta], dim=2)
        self.held_positions = torch.cat([self.held_positions, new], dim=2)
        self.seen += tokens
        output = F.scaled_dot_product_attention(
            query, self.keys, self.values, scale=softmax.scale, is_causal=tokens > 1, enable_gqa=True
        )
        memory_size = self.rule.budgets[0]
        if self.keys.shape[2] >= memory_size + self.rule.buffer_size:
            score = (self.seen - 1 - self.held_positions) * self.log_beta
            kept = score.topk(memory_size, dim=2).indices.sort(dim=2).values
            self.log_beta, self.held_positions = self.log_beta.gather(2, kept), self.held_positions.gather(2, kept)
            index = kept[..., None].expand(-1, -1, -1, self.keys.shape[3])
            self.keys, self.values = self.keys.gather(2, index), self.values.gather(2, index)
        self.is_empty = self.is_attending = False
        return output

    def positions(self, head: int) -> Tensor:
        self.check_head(head)
        return self.held_positions[:, head]

    def holds(self, span: Span) -> bool:
        return self.is_empty

    def restore(self, state: dict[str, Tensor], columns: int) -> None:
        raise ValueError("A rival is measured and not saved.")

    def memory_bytes(self) -> int:
        return storage_bytes(self)

    def get_seq_length(self) -> int:
        return self.seen


class EagerCache(EvictingCache):
    """For a model whose layers are all gated. One prompt, then one token at a time, no padding."""

    def __init__(self, model: nn.Module, memory_size: int, buffer_size: int = 128):
        super().__init__(model, memory_size, budgets="uniform", protected_tokens=0, buffer_size=buffer_size)

    def make_layer(self, rule: EvictionRule, owner: nn.Module) -> EagerLayer:
        return EagerLayer(rule, owner)


def import_kvpress() -> Any:
    """kvpress, which wraps the attention functions that transformers has at that moment: before a model is made.

    Raises:
        ValueError: if it is not installed.
    """
    try:
        import kvpress  # type: ignore[import-not-found,import-untyped,unused-ignore]
    except ImportError as error:
        raise ValueError(
            f"--kvpress needs the package kvpress ({error}). It asks for an older transformers: "
            "pip install --no-deps kvpress cachetools fire termcolor."
        ) from error
    return kvpress


@contextmanager
def pressed(model: PeftModel, memory_size: int, interval: int = 16) -> Iterator[None]:
    """kvpress's decoding: once in `interval` steps the entries with the largest keys go, down to `memory_size`."""
    kvpress = import_kvpress()
    press = kvpress.DecodingPress(kvpress.KnormPress(), interval, memory_size, hidden_states_buffer_size=0)
    with ExitStack() as hooks, model.disable_adapter(), press(model.get_base_model()):
        for layer in find_gated_model(model).gated_layers:
            hook = layer.register_forward_pre_hook(_with_cache_position, with_kwargs=True)
            hooks.callback(hook.remove)
        yield


def _with_cache_position(module: Any, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
    """Adds an argument that kvpress 0.5.5 reads and transformers leaves out from 5.3 on; on the host."""
    past, tokens = find_cache(kwargs).get_seq_length(module.layer_idx), kwargs["hidden_states"].shape[1]
    return args, kwargs | {"cache_position": torch.arange(past, past + tokens)}
