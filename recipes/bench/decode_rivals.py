"""The caches that decoding is measured against."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from peft import PeftModel
from torch import Tensor, nn
from transformers.cache_utils import Cache

from retention_gates import find_gated_model
from retention_gates.gates.cache_argument import find_cache
from retention_gates.gates.cache_layer import GatedCacheLayer


class EagerLayer(GatedCacheLayer):
    """Learned eviction as operators of eager torch: concatenate, and once in `buffer_size` steps choose and gather."""

    keys: Tensor
    values: Tensor
    is_sliding = False
    is_compileable = False

    def __init__(self, memory_size: int, buffer_size: int):
        super().__init__()
        self.memory_size, self.buffer_size = memory_size, buffer_size
        self.seen = 0

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        batch, heads = key_states.shape[:2]
        self.keys, self.values = key_states[:, :, :0], value_states[:, :, :0]
        self.log_beta = torch.zeros(batch, heads, 0, device=key_states.device)
        self.positions = self.log_beta.long()
        self.is_initialized = True

    def stage(self, module: nn.Module, log_beta: Tensor, padding_mask: Tensor | None) -> None:  # type: ignore[override]
        self.staged = log_beta

    def update(self, key_states: Tensor, value_states: Tensor, *args, **kwargs) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        tokens = key_states.shape[2]
        new = torch.arange(self.seen, self.seen + tokens, device=key_states.device).expand_as(self.staged)
        self.keys = torch.cat([self.keys, key_states], dim=2)
        self.values = torch.cat([self.values, value_states], dim=2)
        self.log_beta = torch.cat([self.log_beta, self.staged], dim=2)
        self.positions = torch.cat([self.positions, new], dim=2)
        self.seen += tokens
        return key_states, value_states

    def attend(self, query: Tensor, key: Tensor, value: Tensor, *, scale: float, softcap=None, sinks=None) -> Tensor:
        causal = query.shape[2] > 1
        output = F.scaled_dot_product_attention(
            query, self.keys, self.values, scale=scale, is_causal=causal, enable_gqa=True
        )
        if self.keys.shape[2] >= self.memory_size + self.buffer_size:
            score = (self.seen - 1 - self.positions) * self.log_beta
            kept = score.topk(self.memory_size, dim=2).indices.sort(dim=2).values
            self.log_beta, self.positions = self.log_beta.gather(2, kept), self.positions.gather(2, kept)
            index = kept[..., None].expand(-1, -1, -1, self.keys.shape[3])
            self.keys, self.values = self.keys.gather(2, index), self.values.gather(2, index)
        return output

    def get_seq_length(self) -> int:
        return self.seen

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.seen + query_length, 0

    def get_max_length(self) -> int:
        return -1


class EagerCache(Cache):
    """For a model whose layers are all gated. One prompt, then one token at a time, no padding."""

    def __init__(self, model: nn.Module, memory_size: int, buffer_size: int = 128):
        layers = len(find_gated_model(model).gated_layers)
        super().__init__(layers=[EagerLayer(memory_size, buffer_size) for _ in range(layers)])


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
    """What transformers from 5.3 on leaves out and kvpress 0.5.5 looks at; on the host, as it waits for it."""
    past, tokens = find_cache(kwargs).get_seq_length(module.layer_idx), kwargs["hidden_states"].shape[1]
    return args, kwargs | {"cache_position": torch.arange(past, past + tokens)}
