"""Tiny models with gates whose half-lives differ widely, so that every head evicts in its own way."""

import torch
from peft import PeftModel, get_peft_model
from tiny_models import tiny_model

from retention_gates import RetentionGateConfig, find_gated_model


def gated_model(family: str = "llama", protected_tokens: int = 2, **changes) -> PeftModel:
    """A tiny model of the family with random gates; half-lives are a fraction of a token to some hundred tokens."""
    config = RetentionGateConfig(gate_width=16, initial_half_life=5.0, protected_tokens=protected_tokens)
    # no token ends a text, so that lengths are known
    model = get_peft_model(tiny_model(family, **({"eos_token_id": None} | changes)), config).eval()
    torch.manual_seed(1)
    for layer in find_gated_model(model).gated_layers:
        for parameter in layer.active_gate.parameters():
            if parameter.ndim == 2:
                torch.nn.init.normal_(parameter, std=0.5)
    return model


def token_ids(batch: int, tokens: int, seed: int = 0) -> torch.Tensor:
    """Random ids [B, T], none twice among 94 of a row.

    Keys of equal tokens differ by their rotation only, in the first layer: their norms are equal up to rounding, and
    which of them the policy key_norm evicts would depend on the shapes of the matmuls.
    """
    generator = torch.Generator().manual_seed(seed)
    rows = [
        torch.cat([torch.randperm(94, generator=generator) + 3 for _ in range(-(-tokens // 94))]) for _ in range(batch)
    ]
    return torch.stack(rows)[:, :tokens]


def step_by_step(model, ids, cache, attention_mask=None):
    """Logits [B, T, V] of one token at a time."""
    logits = []
    with torch.no_grad():
        for step in range(ids.shape[1]):
            mask = None if attention_mask is None else attention_mask[:, : step + 1]
            logits.append(model(input_ids=ids[:, step : step + 1], past_key_values=cache, attention_mask=mask).logits)
    return torch.cat(logits, dim=1)
