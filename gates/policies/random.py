"""Chance, as the floor that any policy should beat."""

from typing import Any

import torch

from retention_gates.gates.policies.policy import NewTokens, ScoredPolicy

MASK = 0xFFFFFFFF  # arithmetic is on 32 bits inside int64; products wrap, their low 32 bits are right


def uniform(new: NewTokens) -> torch.Tensor:
    """A hash of (seed, layer, head, offset), uniform in [0, 1): the same however the tokens arrive.

    Random eviction is the usual lower bound, e.g. in H2O, https://arxiv.org/abs/2306.14048. The mixing function is
    murmur3's finaliser.
    """
    heads = torch.arange(new.key.shape[1], device=new.key.device)[:, None]
    of_layer = mix(mix(new.seed) + new.layer)
    if isinstance(of_layer, torch.Tensor):
        of_layer = of_layer[:, None, None]
    of_heads = mix(heads + of_layer)  # [H, 1] or [B, H, 1]
    of_tokens = mix(of_heads + new.offset[:, None])  # [B, H, T]
    return (of_tokens >> 8).float() / 2**24


def mix(x: Any) -> Any:
    """32 bits of a whole number, or of each in a tensor of them, that look like chance."""
    x = x & MASK
    x = ((x ^ (x >> 16)) * 0x85EBCA6B) & MASK
    x = ((x ^ (x >> 13)) * 0xC2B2AE35) & MASK
    return x ^ (x >> 16)


RANDOM = ScoredPolicy(name="random", recent_fraction=0.5, score=uniform)
