"""Finds the attention modules of a base model that can have a gate, from its config and modules alone."""

import re

from torch import nn
from transformers import DynamicCache, PreTrainedConfig
from transformers.cache_utils import DynamicLayer

from retention_gates.gates.adapter.layer import RetentionGatedAttention


def text_config(model: nn.Module) -> PreTrainedConfig:
    """The config of the decoder that makes the text."""
    config = getattr(model, "config", None)
    if not isinstance(config, PreTrainedConfig):
        raise ValueError(
            f"{type(model).__name__} is no transformers model: retention gates wrap Hugging Face decoders."
        )
    return config.get_text_config(decoder=True)


def key_value_heads(config: PreTrainedConfig) -> int:
    return getattr(config, "num_key_value_heads", None) or config.num_attention_heads


def full_attention_layers(model: nn.Module) -> dict[int, str]:
    """Layer index -> module name of every layer that attends to all of the past, in order.

    Raises:
        ValueError: for a model whose cache cannot be bounded per head, saying why.
    """
    config = text_config(model)
    name = type(model).__name__
    if getattr(config, "is_encoder_decoder", False):
        raise ValueError(f"{name} is an encoder-decoder: retention gates bound the self-attention cache of decoders.")
    if getattr(config, "kv_lora_rank", None) is not None:
        raise ValueError(
            f"{name} has multi-head latent attention (kv_lora_rank={config.kv_lora_rank}): its heads share one latent "
            "per token, so that no head can drop a token by itself. Choose a model with multi-head or grouped-query "
            "attention."
        )
    attention = {
        module.layer_idx: module_name.removesuffix(".base_layer")
        for module_name, module in model.named_modules()
        if not isinstance(module, RetentionGatedAttention) and _is_causal_attention(module)
    }
    if not attention:
        raise ValueError(
            f"{name} has no causal self-attention layers: an encoder or a recurrent model keeps no cache to bound."
        )
    if getattr(config, "num_kv_shared_layers", None):
        raise ValueError(
            f"{name} shares keys and values between layers (num_kv_shared_layers={config.num_kv_shared_layers}): "
            "later layers would read what an earlier one has evicted. Choose a model whose layers have their own."
        )
    cache_layers = DynamicCache(config=config).layers
    full = {
        i: attention[i] for i in sorted(attention) if i < len(cache_layers) and type(cache_layers[i]) is DynamicLayer
    }
    if not full:
        kinds = sorted({type(layer).__name__ for layer in cache_layers})
        raise ValueError(
            f"{name} has no full-attention layer (its cache layers are {', '.join(kinds)}): its memory is bounded "
            "already. If the model allows, set sliding_window=None in its config."
        )
    return full


def module_pattern(names: dict[int, str]) -> str:
    """A regular expression that matches the given modules, layer index -> name, and no others.

    PEFT shortens long lists of names to a suffix that more modules may share; an expression it leaves alone.
    """
    layers: dict[tuple[str, str], list[str]] = {}
    for layer, name in names.items():
        before, _, after = name.partition(f".{layer}.")
        layers.setdefault((before, after), []).append(str(layer))
    return "|".join(
        rf"{re.escape(before)}\.({'|'.join(indices)})\.{re.escape(after)}"
        for (before, after), indices in layers.items()
    )


def _is_causal_attention(module: nn.Module) -> bool:
    return (
        type(module).__name__.endswith("Attention")
        and isinstance(getattr(module, "layer_idx", None), int)
        and getattr(module, "is_causal", False) is True
    )
