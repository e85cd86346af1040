"""The wrapper around one attention module of the base model."""

from functools import partial
from typing import Any, cast

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from transformers.cache_utils import Cache
from transformers.utils import logging

from retention_gates.compat import attention_implementation
from retention_gates.gates.adapter.config import RetentionGateConfig
from retention_gates.gates.adapter.gate import GATES, RetentionGate
from retention_gates.gates.adapter.gate_outputs import Recording
from retention_gates.gates.adapter.placement import check_gradient_arrives
from retention_gates.gates.attention.cache_argument import find_layer_cache
from retention_gates.gates.attention.cache_layer import EvictingLayer
from retention_gates.gates.attention.documents import (
    check_padding_mask,
    document_ids_from,
    document_offsets,
    padding_in,
)
from retention_gates.gates.attention.fading import Fading
from retention_gates.gates.attention.interface import PREFIX, base_causal_mask
from retention_gates.gates.attention.sequence_parallel import RowGroup, whole_ids

logger = logging.get_logger(__name__)


class RetentionGatedAttention(nn.Module, BaseTunerLayer):
    """An attention module with a gate beside it. The module itself is called, never copied.

    Without a cache it trains: attention decays with log_beta (TRIM-KV, arXiv 2512.03324, eq. 3). With a bounded cache
    attention is plain and the cache evicts. With any other cache attention is plain and nothing is evicted.
    """

    base_layer: Any  # the attention module, of whatever class the base model has
    adapter_layer_names = ("retention_gate",)
    other_param_names = ("protected_tokens",)

    def __init__(self, base_layer: nn.Module):
        super().__init__()
        self.base_layer = base_layer
        self.retention_gate = nn.ModuleDict()
        self.protected_tokens: dict[str, int] = {}
        self.recording: Recording | None = None
        self.fading = Fading()
        self.row_group: RowGroup | None = None  # while rows are split over ranks, which hold T / P tokens each
        self._disable_adapters = False
        self.merged_adapters: list[str] = []

    def __getattr__(self, name: str) -> Any:  # decoder layers may read attributes of their attention module
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "base_layer":
                raise
            return getattr(self.base_layer, name)

    def update_layer(self, adapter_name: str, config: RetentionGateConfig, hidden_size: int, heads: int) -> None:
        self.retention_gate[adapter_name] = GATES[config.gate_type](hidden_size, heads, config)
        self.protected_tokens[adapter_name] = config.protected_tokens
        self._move_adapter_to_device_of_base_layer(adapter_name)
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: torch.device | None = None) -> None:
        parameter = next(self.base_layer.parameters())
        device = device or parameter.device
        gate = self.retention_gate[adapter_name]
        if device.type != "meta" and not any(p.is_meta for p in gate.parameters()):
            gate.to(device)

    def enable_adapters(self, enabled: bool) -> None:
        """Turns the gates on or off, and leaves to the model which parameters learn: layers may share some."""
        self._disable_adapters = not enabled

    def follow(self, active_adapter: str | list[str], *, enabled: bool) -> None:
        """Does as the layers do that were wrapped before it."""
        self._active_adapter = active_adapter
        self.enable_adapters(enabled)

    @property
    def active_gate_name(self) -> str | None:
        if self.disable_adapters:
            return None
        names = [name for name in self.active_adapters if name in self.retention_gate]
        if len(names) > 1:
            raise ValueError(
                f"Adapters {names} are active at once; a layer has one gate: model.set_adapter(one of them)."
            )
        return names[0] if names else None

    @property
    def active_gate(self) -> RetentionGate | None:
        name = self.active_gate_name
        return None if name is None else cast(RetentionGate, self.retention_gate[name])

    def forward(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        if self.disable_adapters and self.row_group is None:
            return self.base_layer(hidden_states, *args, **kwargs)
        self._check_implementation()
        check_padding_mask(kwargs.get("attention_mask"))
        gate = self.active_gate
        cache = find_layer_cache(args, kwargs)
        if gate is None:
            return self._forward_undecayed(hidden_states, cache, *args, **kwargs)
        if cache is None:
            return self._forward_decayed(gate, hidden_states, *args, **kwargs)
        layer = self.base_layer.layer_idx
        cache_layer = cache.layers[layer] if layer < len(cache.layers) else None
        if isinstance(cache_layer, EvictingLayer):
            return self._forward_bounded(gate, cache_layer, hidden_states, *args, **kwargs)
        if any(isinstance(other, EvictingLayer) for other in cache.layers):
            raise ValueError(
                f"Layer {layer} has a gate in the adapter {self.active_gate_name!r}, but the cache was made while "
                "another was active: make a new BoundedCache after model.set_adapter."
            )
        logger.warning_once(
            f"Retention gates are on but the cache is a {type(cache).__name__}: nothing is evicted and memory grows. "
            "Pass past_key_values=BoundedCache(model, memory_size=...), or use_cache=False for the decayed attention."
        )
        return self._forward_undecayed(hidden_states, cache, *args, **kwargs)

    def _forward_bounded(
        self,
        gate: RetentionGate,
        cache_layer: EvictingLayer,
        hidden_states: torch.Tensor,
        /,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        """Plain attention over what a bounded cache holds, which then evicts by log_beta."""
        rows, tokens = hidden_states.shape[:2]
        cache_layer.begin(self, tokens)
        is_finished_there = cache_layer.takes_gate_output and tokens == 1 and gate.can_be_finished_elsewhere
        with torch.no_grad():
            log_beta = gate.unfinished(hidden_states) if is_finished_there else gate(hidden_states)
        padding_mask = padding_in(kwargs.get("attention_mask"), rows, tokens)
        road = {"cache_layer": cache_layer, "log_beta": log_beta, "padding_mask": padding_mask}
        return self.base_layer(hidden_states, *args, **kwargs, **road)

    def _forward_undecayed(
        self, hidden_states: torch.Tensor, cache: Cache | None, /, *args: Any, **kwargs: Any
    ) -> Any:
        """The base's attention, with the mask that the base would have made for it."""
        padding_mask, position_ids = self._of_whole_rows(kwargs)
        length = hidden_states.shape[1]
        if self.row_group is not None:
            length *= self.row_group.size
            kwargs["row_group"] = self.row_group
        mask = base_causal_mask(self.base_layer, hidden_states, padding_mask, position_ids, cache, length)
        return self.base_layer(hidden_states, *args, **(kwargs | {"attention_mask": mask}))

    def _of_whole_rows(self, kwargs: dict[str, Any]) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """The padding mask and position_ids, also where this rank was called with a part of the rows."""
        mask = whole_ids(kwargs.get("attention_mask"), self.row_group)
        return mask, whole_ids(kwargs.get("position_ids"), self.row_group)

    def _forward_decayed(self, gate: RetentionGate, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        recording = self.recording
        layerwise = recording is not None and recording.layerwise
        if layerwise:
            hidden_states = hidden_states.detach()
        documents = document_ids_from(*self._of_whole_rows(kwargs), len(hidden_states))
        log_beta = gate(hidden_states)
        if log_beta.requires_grad and not torch.compiler.is_compiling():
            log_beta.register_hook(partial(check_gradient_arrives, gate, self.base_layer.layer_idx))
        if self.row_group is not None:
            kwargs["row_group"] = self.row_group
            log_beta = self.row_group.whole(log_beta)
        log_beta = self._protect(log_beta, documents)
        kwargs |= {"document_ids": documents, "gaussian": self.fading.gaussian}
        student = self.base_layer(hidden_states, *args, log_beta=self.fading.of(log_beta), **kwargs)
        if recording is None:
            return student
        recording.log_beta.append(log_beta)
        recording.document_ids = documents
        if not layerwise:
            return student
        with torch.no_grad():  # the same attention without decay, so that one mask serves both
            undecayed = torch.zeros_like(log_beta)
            teacher = self.base_layer(hidden_states, *args, log_beta=undecayed, **kwargs)
        recording.layer_losses.append(_relative_error(student[0], teacher[0], documents))
        return teacher

    def _protect(self, log_beta: torch.Tensor, documents: torch.Tensor | None) -> torch.Tensor:
        assert self.active_gate_name is not None
        protected = self.protected_tokens[self.active_gate_name]
        if not protected:
            return log_beta
        if documents is None:
            offsets = torch.arange(log_beta.shape[-1], device=log_beta.device)[None]
        else:
            offsets = document_offsets(documents)
        return log_beta.masked_fill((offsets < protected)[:, None], 0.0)

    def _check_implementation(self) -> None:
        name = attention_implementation(self.base_layer.config) or ""
        if not name.startswith(PREFIX):
            raise ValueError(
                f"The attention implementation was set to {name!r} after the gates were added and would ignore them. "
                "Choose attn_implementation when the base model is loaded, before get_peft_model."
            )


def _relative_error(student: torch.Tensor, teacher: torch.Tensor, documents: torch.Tensor | None) -> torch.Tensor:
    """Squared error of the attention output [B, T, C] over its squared norm, padding left out; the mean over rows.

    Each row is relative to itself, so that it does not matter which rows are computed together.
    """
    error = (student - teacher).float().square().sum(-1)
    size = teacher.float().square().sum(-1)
    if documents is not None:
        error, size = error * (documents >= 0), size * (documents >= 0)
    return (error.sum(-1) / size.sum(-1).clamp(min=torch.finfo(torch.float32).tiny)).mean()
