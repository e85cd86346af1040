"""The attention function and the mask function that transformers calls while gates are on.

Each base implementation ("sdpa", "eager", ...) has a gated twin, registered under its own name. With the gates off the
model's config names the base implementation again, so that nothing of ours runs at all.
"""

import sys
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.cache_utils import Cache
from transformers.masking_utils import (
    ALL_MASK_ATTENTION_FUNCTIONS,
    and_masks,
    causal_mask_function,
    packed_sequence_mask_function,
)
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from retention_gates.compat import attention_implementation
from retention_gates.gates.attention.cache_layer import EvictingLayer
from retention_gates.gates.attention.documents import document_ids_from
from retention_gates.gates.attention.sequence_parallel import RowGroup, attend_by_heads
from retention_gates.kernels.gate_evict import GateOutput
from retention_gates.kernels.retention_attention import retention_attention
from retention_gates.kernels.softmax import Softmax

PREFIX = "retention_gates_"
MASKS = {  # base implementation -> the mask it gets for the places [B, W] that one token sees
    "sdpa": lambda visible, dtype: visible[:, None, None],
    "eager": lambda visible, dtype: visible.new_zeros((), dtype=dtype).where(
        visible[:, None, None], torch.finfo(dtype).min
    ),
}


def gated_implementation(base_implementation: str | None) -> str:
    """The name under which the gated twin of a base attention implementation is registered."""
    base = base_implementation or "eager"
    # transformers takes any name with "flash" in it for one of its own flash kernels
    name = PREFIX + base.replace("flash_attention", "fa").replace("|", "_").replace("/", "_")
    if name not in ALL_ATTENTION_FUNCTIONS:
        AttentionInterface.register(name, partial(attention_forward, base_implementation=base))
        AttentionMaskInterface.register(name, partial(attention_mask_for, base_implementation=base))
    return name


def base_implementation_of(gated_name: str) -> str:
    """The base implementation whose gated twin is registered under this name."""
    return ALL_ATTENTION_FUNCTIONS[gated_name].keywords["base_implementation"]


def attention_forward(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    row_group: RowGroup | None = None,
    **options: Any,
) -> tuple[torch.Tensor, None]:
    """Attention of one layer; with a row_group for rows of which each of its ranks holds a part."""
    if row_group is None:
        return _attend(module, query, key, value, attention_mask, **options)
    return attend_by_heads(row_group, _attend, module, query, key, value, attention_mask, **options)


def _attend(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    base_implementation: str,
    log_beta: torch.Tensor | GateOutput | None = None,
    padding_mask: torch.Tensor | None = None,
    document_ids: torch.Tensor | None = None,
    gaussian: bool = False,
    cache_layer: EvictingLayer | None = None,
    scaling: float | None = None,
    dropout: float = 0.0,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Attention of one layer: over a bounded cache, decayed by log_beta, or the base implementation's.

    Args:
        query: [B, HQ, T, D]; key and value: [B, H, S, D].
        log_beta: [B, H, T], or what `EvictingLayer.attend` takes; None for the base implementation's attention.
        padding_mask: as for `EvictingLayer.attend`.
        gaussian: as in `retention_attention`.
        cache_layer: the layer of a bounded cache that takes key and value, else None.
    """
    if cache_layer is None and log_beta is None:
        base = _base_attention(module, base_implementation)
        if softcap is not None:
            kwargs["softcap"] = softcap
        if s_aux is not None:
            kwargs["s_aux"] = s_aux
        return base(module, query, key, value, attention_mask, scaling=scaling, dropout=dropout, **kwargs)
    if dropout:
        raise ValueError(
            f"attention dropout of {dropout} while retention gates are on: teacher and student would differ by "
            "chance. Set attention_dropout = 0 in the model's config."
        )
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    # under autocast the rotary embedding leaves queries and keys in fp32 and values in 16 bits
    query, key = query.to(value.dtype), key.to(value.dtype)
    if cache_layer is not None:
        assert log_beta is not None
        device = query.device.type
        is_casting = torch.is_autocast_enabled(device)  # which would round scores and weights to 16 bits
        with torch.autocast(device, enabled=False) if is_casting else nullcontext():
            output = cache_layer.attend(query, key, value, log_beta, padding_mask, Softmax(scale, softcap, s_aux))
    else:
        assert isinstance(log_beta, torch.Tensor)
        if key.shape[2] != log_beta.shape[2]:
            raise ValueError(
                f"A layer with retention gates got {log_beta.shape[2]} tokens and no cache, but attends to "
                f"{key.shape[2]} keys: this version of transformers keeps a cache where this version of "
                "retention-gates does not look for it. Install a transformers that it was tested with, or pass "
                "use_cache=False."
            )
        # a gate's output is a logsigmoid; that no number is NaN is checked once a step, by the capacity loss
        output = retention_attention(
            query,
            key,
            value,
            log_beta,
            scale=scale,
            document_ids=document_ids,
            softcap=softcap,
            sinks=s_aux,
            gaussian=gaussian,
            check_values=False,
        )
    return output.transpose(1, 2).contiguous(), None  # [B, T, HQ, D]


def attention_mask_for(*args: Any, base_implementation: str, **kwargs: Any) -> torch.Tensor | None:
    """The 2-D padding mask as it is for full attention, so that nothing [T, T] is built; the base's for the rest."""
    if kwargs.get("local_size") is not None:
        if isinstance(visible := kwargs.get("kv_offset"), torch.Tensor):  # of a WindowLayer in a captured step
            return MASKS[base_implementation](visible, kwargs["dtype"])
        return ALL_MASK_ATTENTION_FUNCTIONS[base_implementation](*args, **kwargs)
    if kwargs.get("use_vmap"):
        raise ValueError(
            "This model overlays its causal mask with one of its own (images or prefixes seen in both directions); "
            "retention gates know causal text only. Run it under model.disable_adapter()."
        )
    return kwargs.get("attention_mask")


def base_causal_mask(
    module: Any,
    hidden_states: torch.Tensor,
    padding_mask: torch.Tensor | None,
    position_ids: torch.Tensor | None,
    cache: Cache | None,
    length: int | None = None,
) -> torch.Tensor | None:
    """The mask the base implementation would have got for a full-attention layer that evicts nothing.

    Args:
        hidden_states: [B, T, C], for sizes and device.
        padding_mask: [B, S], the past and the new tokens, or None.
        position_ids: [B, T] or [1, T]; where there is neither mask nor cache they show packed documents.
        length: T, if hidden_states are only a part of the rows.
    """
    base = base_implementation_of(attention_implementation(module.config) or "")
    batch, layer = hidden_states.shape[0], module.layer_idx
    length = hidden_states.shape[1] if length is None else length
    kv_length, kv_offset = (length, 0) if cache is None else cache.get_mask_sizes(length, layer)
    pattern: Callable[..., Any] = causal_mask_function
    if padding_mask is not None:
        padding_mask = padding_mask.bool()
    elif cache is None:
        packed = document_ids_from(None, position_ids, batch)
        if packed is not None and bool(packed.any()):
            pattern = and_masks(causal_mask_function, packed_sequence_mask_function(packed))
    return ALL_MASK_ATTENTION_FUNCTIONS[base](
        batch_size=batch,
        q_length=length,
        kv_length=kv_length,
        q_offset=0 if cache is None else cache.get_seq_length(layer),
        kv_offset=kv_offset,
        mask_function=pattern,
        attention_mask=padding_mask,
        allow_is_causal_skip=pattern is causal_mask_function,
        dtype=hidden_states.dtype,
        device=hidden_states.device,
        config=module.config,
    )


def _base_attention(module: nn.Module, base_implementation: str) -> Callable[..., Any]:
    eager: Any = getattr(sys.modules[type(module).__module__], "eager_attention_forward", None)
    return ALL_ATTENTION_FUNCTIONS.get_interface(base_implementation, eager)
