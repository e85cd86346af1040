"""Forward passes of several contenders side by side, each through a `SimulatedCache`."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import groupby
from typing import Any

import torch
from torch import nn

from retention_gates.gates.adapter.families import text_config
from retention_gates.gates.adapter.model import RetentionGateModel, find_gated_model
from retention_gates.gates.adapter.modes import evaluating
from retention_gates.gates.simulation.simulated_cache import SimulatedCache
from retention_gates.trainers.evaluation.contenders import Contender

# tokens that go through the model at a time, contenders side by side, on a CPU and at most on a GPU: with more of them
# a simulated step costs each less, and steps of several policies run at the same time
TOKENS_AT_A_TIME = (2**15, 2**21)


Progress = Callable[[int], Any]  # is told how many forward passes x rows were done


Records = list[dict[str, Any]]


def check_length(gated: RetentionGateModel, length: int) -> None:
    """Raises ValueError if the model has no positions for rows of so many tokens."""
    most = getattr(text_config(gated.model), "max_position_embeddings", None)
    if most is not None and length > most:
        raise ValueError(
            f"Rows of {length} tokens are longer than the model's {most} positions: ask for a length of {most} or "
            "less, or take a model with a longer context."
        )


def hidden_states(
    model: nn.Module,
    ids: torch.Tensor,
    chosen: Sequence[Contender],
    seeds: Sequence[int],
    progress: Progress,
    pinned: Sequence[tuple[int, int]] = (),
) -> Iterator[tuple[Sequence[Contender | None], Sequence[torch.Tensor]]]:
    """Gives lm_head's inputs, [B, T, C] each: from the full cache, None, and then from some contenders at a time."""
    gated = find_gated_model(model)  # passes go through what it lies in, which may put a sharded model together
    caches = [_cache_of(gated, contender, pinned) for contender in chosen]  # refused before anything is computed
    with evaluating(gated):
        with gates_off(gated):
            full = model(input_ids=ids, use_cache=False, last_hidden_state_only=True)
        progress(len(ids))
        yield [None], [full]
        for some in _passes(chosen, max(1, tokens_at_a_time(gated, ids.device) // ids.numel())):
            hidden = model(
                input_ids=ids.repeat(len(some), 1),
                past_key_values=SimulatedCache.side_by_side(
                    [caches.pop(0) for _ in some],  # nobody else has them: what a pass has found out goes with it
                    torch.tensor(seeds, device=ids.device),
                ),
                use_cache=True,
                last_hidden_state_only=True,
            )
            progress(len(some) * len(ids))
            yield some, hidden.split(len(ids))


def row_seeds(seed: int | Sequence[int], rows: Sequence[int]) -> list[int]:
    return [seed if isinstance(seed, int) else seed[row] for row in rows]


def _passes(chosen: Sequence[Contender], at_a_time: int) -> Iterator[list[Contender]]:
    """Contenders that go through the model together: all of one policy, which share steps, and more if they fit."""
    some: list[Contender] = []
    for _, group in groupby(chosen, key=lambda contender: (contender.policy, contender.pin)):
        own = list(group)
        if some and len(some) + len(own) > at_a_time:
            yield some
            some = []
        some += own
        while len(some) > at_a_time:
            yield some[:at_a_time]
            some = some[at_a_time:]
    if some:
        yield some


def tokens_at_a_time(gated: RetentionGateModel, device: torch.device) -> int:
    """On a GPU what a third of the free memory has room for."""
    if device.type != "cuda":
        return TOKENS_AT_A_TIME[0]
    config = text_config(gated.model)
    width = config.hidden_size
    numbers = 12 * width + 3 * getattr(config, "intermediate_size", 4 * width)  # of a token that live at once
    room = torch.cuda.mem_get_info(device)[0] // 3 // (numbers * gated.model.dtype.itemsize)
    return min(TOKENS_AT_A_TIME[1], max(TOKENS_AT_A_TIME[0], room))


def _cache_of(gated: RetentionGateModel, contender: Contender, pinned: Sequence[tuple[int, int]]) -> SimulatedCache:
    if contender.pin and not pinned:
        raise ValueError(f"{contender} pins, but what is scored has no spans to pin: leave pin=False.")
    cache = SimulatedCache(gated, contender.memory_size, policy=contender.policy, budgets=contender.division)
    for span in pinned if contender.pin else ():
        cache.pin(*span)
    return cache


@contextmanager
def gates_off(gated: RetentionGateModel) -> Iterator[None]:
    """Inside the block the model is the base model; afterwards the gates are on again, unless they were off before."""
    layers = gated.gated_layers
    if layers and all(layer.disable_adapters for layer in layers):
        yield
        return
    try:
        gated.disable_adapter_layers()
        yield
    finally:
        gated.enable_adapter_layers()
