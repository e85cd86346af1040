"""Bytes that a cache takes in memory, measured on the caches themselves."""

from collections.abc import Sequence

import torch
from torch import nn
from transformers import DynamicCache

from retention_gates.gates.adapter.families import text_config
from retention_gates.gates.adapter.model import find_gated_model
from retention_gates.gates.cache.bounded_cache import BoundedCache
from retention_gates.trainers.evaluation.contenders import Contender
from retention_gates.trainers.evaluation.forward_passes import gates_off


@torch.no_grad()
def memory_bytes(model: nn.Module, ids: torch.Tensor, chosen: Sequence[Contender]) -> list[int]:
    """Bytes per sequence that the full cache holds after the tokens [T], and then each contender's cache.

    Bounded layers count with their slots and all that they store beside keys and values; layers that transformers
    keeps, such as those with sliding windows, are the same in all of them.
    """
    gated = find_gated_model(model)
    ids = ids[None].to(gated.model.get_input_embeddings().weight.device)
    full = DynamicCache(config=text_config(gated.model))
    with gates_off(gated):
        gated(input_ids=ids, past_key_values=full, use_cache=True, last_hidden_state_only=True)
    evicting = {wrapper.layer_idx for wrapper in gated.gated_layers}
    held = [
        sum(
            states.nbytes
            for states in (getattr(layer, "keys", None), getattr(layer, "values", None))
            if states is not None
        )
        for layer in full.layers
    ]
    others = sum(nbytes for index, nbytes in enumerate(held) if index not in evicting)
    sizes = [sum(held)]
    for contender in chosen:
        cache = BoundedCache(gated, contender.memory_size, policy=contender.policy, budgets=contender.division)
        gated(input_ids=ids[:, :1], past_key_values=cache, use_cache=True, last_hidden_state_only=True)
        sizes.append(others + sum(layer.memory_bytes() for layer in cache.gated_layers))
    return sizes
