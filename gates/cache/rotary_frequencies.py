"""The rotary embedding of a base model, for policies that rotate queries to other positions."""

from typing import Any

import torch
from torch import nn

from retention_gates.gates.adapter.families import text_config


def rotary_frequencies(model: nn.Module, policy: str) -> tuple[float, ...]:
    """Radians per position of each pair of channels, D / 2 numbers.

    Raises:
        ValueError: unless the model rotates all channels of a head, i with i + D / 2, by one set of frequencies.
    """
    found = {name: module for name, module in model.named_modules() if name.rpartition(".")[2] == "rotary_emb"}
    config = text_config(model)
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    if len(found) == 1:
        (rotary,) = found.values()
        frequencies = getattr(rotary, "inv_freq", None)
        if isinstance(frequencies, torch.Tensor) and 2 * len(frequencies) == head_dim and _is_by_halves(rotary):
            return tuple(frequencies.float().tolist())
    raise ValueError(
        f"policy={policy!r} rotates queries to other positions and knows rotary embeddings that rotate all channels "
        f"of a head, by halves and alike in all layers. This {type(model).__name__} has none: choose another policy."
    )


def _is_by_halves(rotary: Any) -> bool:
    x = torch.zeros(1, 1, 1, device=rotary.inv_freq.device)
    cos = rotary(x, torch.ones(1, 1, dtype=torch.int64, device=x.device))[0][0, 0]
    first, second = cos.chunk(2)
    return len(cos) == 2 * len(rotary.inv_freq) and torch.equal(first, second)
