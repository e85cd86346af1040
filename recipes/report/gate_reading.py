"""Reads a text with the gates, and follows what a bounded cache does with it."""

import math
from dataclasses import dataclass

import torch
from torch import nn

from retention_gates.gates.adapter.gate import half_life
from retention_gates.gates.adapter.gate_outputs import record
from retention_gates.gates.adapter.model import find_gated_model
from retention_gates.gates.cache.budgets import Budgets
from retention_gates.gates.simulation.simulated_cache import SimulatedCache
from retention_gates.trainers.evaluation.forward_passes import check_length

LONGEST_HALF_LIFE = 1e9  # tokens; anything longer is "for ever" in a picture
NEAR_THE_MEAN = 1.5  # a head's budget times or by this is still near the mean of all


@dataclass
class Reading:
    """The gates' outputs for one text, and what a bounded cache does with it."""

    half_lives: "torch.Tensor"  # [layers, H, T], in tokens; infinite where protected
    eviction_times: "torch.Tensor"  # [layers, H, T], first step at which a token is no longer seen; T: never
    budgets: list[list[int]]  # [layers][H]

    @property
    def tokens(self) -> int:
        return self.half_lives.shape[-1]


def read_text(
    model: "nn.Module", ids: "torch.Tensor", *, memory_size: int, budgets: "str | Budgets | None"
) -> Reading:
    """Half-lives and eviction times of a text's tokens [T], as a bounded cache would see them step by step.

    Raises:
        ValueError: for a text too short to evict anything, or longer than the model's positions.
    """
    gated = find_gated_model(model)
    check_length(gated, len(ids))
    cache = SimulatedCache(gated, memory_size, budgets=budgets)
    said: list[torch.Tensor] = []  # log_beta [1, H, T] of each gated layer, in order

    def listen(gate: object, inputs: object, log_beta: torch.Tensor) -> None:
        said.append(log_beta[0].cpu())

    gates = [gate for layer in gated.gated_layers if (gate := layer.active_gate) is not None]
    hooks = [gate.register_forward_hook(listen) for gate in gates]
    try:
        with torch.no_grad():
            place = gated.model.get_input_embeddings().weight.device
            gated(input_ids=ids[None].to(place), past_key_values=cache, use_cache=True, last_hidden_state_only=True)
    finally:
        for hook in hooks:
            hook.remove()
    half_lives = half_life(torch.stack(said))
    half_lives[..., : gated.active_config.protected_tokens] = float("inf")
    times = torch.stack([layer.eviction_times[0].cpu() for layer in cache.gated_layers])
    if bool((times >= len(ids)).all()):
        raise ValueError(
            f"A memory of {memory_size} entries per head evicts none of {len(ids)} tokens: show a longer text, or "
            "choose a smaller --memory-size."
        )
    return Reading(half_lives, times, cache.budgets)


def telling_head(reading: Reading) -> tuple[int, int]:
    """Layer (of those gated) and head worth looking at first.

    Of the heads with a budget near the mean, it is the one in which tokens stay for the most different times: the
    largest entropy of lifetimes, counted by powers of two, those held at the end apart. A sliding window, in which all
    tokens stay equally long, has none.
    """
    budgets = torch.tensor(reading.budgets, dtype=torch.float64)  # [layers, H]
    away = (budgets / budgets.mean()).log().abs()
    near = away <= max(math.log(NEAR_THE_MEAN), float(away.min()))
    lifetimes = reading.eviction_times - torch.arange(reading.tokens)
    kinds = lifetimes.clamp(min=1).double().log2().floor().long()  # [layers, H, T]
    kinds[reading.eviction_times >= reading.tokens] = kinds.max() + 1
    shares = torch.nn.functional.one_hot(kinds).double().mean(2)  # [layers, H, kinds]
    entropy = torch.special.entr(shares).sum(-1).where(near, -1.0)
    layer, head = divmod(int(entropy.argmax()), budgets.shape[1])
    return layer, head


def median_half_lives(model: "nn.Module", rows: "torch.Tensor") -> "torch.Tensor":
    """Median half-life in tokens of unprotected tokens of the rows [R, T], as in training: [layers, H]."""
    gated = find_gated_model(model)
    protected = gated.active_config.protected_tokens
    found = []  # [layers, H, T] of each row
    for row in rows:
        with torch.no_grad(), record(gated) as recording:
            ids = row[None].to(gated.model.get_input_embeddings().weight.device)
            gated(input_ids=ids, use_cache=False, last_hidden_state_only=True)
        found.append(torch.stack([half_life(log_beta[0, :, protected:]).cpu() for log_beta in recording.log_beta]))
    return torch.cat(found, dim=-1).clamp(max=LONGEST_HALF_LIFE).median(-1).values
