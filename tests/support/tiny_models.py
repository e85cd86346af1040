"""Tiny random models of every family that the gates are tested on."""

import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedModel

SMALL = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 512,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
SLIDING = {"sliding_window": 8}
MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
EVERY_OTHER = ["sliding_attention", "full_attention"] * 2
LINEAR_ATTENTION = {
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "linear_conv_kernel_dim": 3,
    "shared_expert_intermediate_size": 16,
    "layer_types": ["linear_attention", "full_attention"] * 2,
}

# family -> (what differs from SMALL, indices of its full-attention layers)
FAMILIES: dict[str, tuple[dict, list[int]]] = {
    "llama": ({}, [0, 1, 2, 3]),
    "qwen2": ({}, [0, 1, 2, 3]),
    "qwen3": ({}, [0, 1, 2, 3]),
    "qwen3_moe": (MOE, [0, 1, 2, 3]),
    "mistral": ({"sliding_window": None}, [0, 1, 2, 3]),
    "phi3": ({}, [0, 1, 2, 3]),
    "gemma2": (SLIDING | {"layer_types": EVERY_OTHER, "query_pre_attn_scalar": 8}, [1, 3]),
    "gemma3_text": (SLIDING | {"layer_types": EVERY_OTHER, "query_pre_attn_scalar": 8}, [1, 3]),
    "olmo2": ({}, [0, 1, 2, 3]),
    "smollm3": ({}, [0, 1, 2, 3]),
    "granite": ({"logits_scaling": 2.0, "attention_multiplier": 0.3, "residual_multiplier": 0.5}, [0, 1, 2, 3]),
    "glm4": ({}, [0, 1, 2, 3]),
    "gpt_oss": (SLIDING | {"layer_types": EVERY_OTHER, "num_local_experts": 4, "num_experts_per_tok": 2}, [1, 3]),
    "cohere2": (SLIDING | {"layer_types": EVERY_OTHER, "logit_scale": 0.25}, [1, 3]),
    "qwen3_next": (MOE | LINEAR_ATTENTION, [1, 3]),
}


def tiny_config(family: str, **changes):
    return CONFIG_MAPPING[family](**(SMALL | FAMILIES.get(family, ({}, []))[0] | changes))


def tiny_model(family: str = "llama", **changes) -> PreTrainedModel:
    """A random model of the family, the same at every call, in eval mode."""
    torch.manual_seed(0)
    config = tiny_config(family, **changes)
    # older transformers run a softcapped model with sdpa, which leaves the softcap out
    softcap = getattr(config, "attn_logit_softcapping", None)
    arguments = {"attn_implementation": "eager"} if softcap is not None else {}
    model = AutoModelForCausalLM.from_config(config, **arguments).eval()
    for parameter in model.parameters():  # a default init is so small that attention would be nearly uniform
        if parameter.ndim >= 2:
            torch.nn.init.normal_(parameter, std=0.15)
    for name, parameter in model.named_parameters():
        if name.endswith("sinks"):
            torch.nn.init.normal_(parameter, std=1.0)
    return model
