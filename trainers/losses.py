"""The loss that makes gates forget."""

from collections.abc import Sequence
from typing import Literal, NamedTuple, get_args

import torch

from retention_gates.gates.attention.documents import document_offsets
from retention_gates.gates.cache.budgets import retained_masses

CapacityNormalisation = Literal["length", "excess"]
CapacityScope = Literal["head", "model"]


class CapacityLoss(NamedTuple):
    loss: torch.Tensor  # scalar
    retained_mass: torch.Tensor  # [layers], mean S_t over KV heads and steps, in tokens; detached


def capacity_loss(
    log_beta: Sequence[torch.Tensor],
    memory_size: int,
    *,
    document_ids: torch.Tensor | None = None,
    normalisation: CapacityNormalisation = "length",
    scope: CapacityScope = "head",
) -> CapacityLoss:
    """The mass that the gates retain above `memory_size` entries per KV head, relative to the tokens so far.

    "length": the mean over layers, KV heads and steps of max(0, S_t - M) / t, t the step's 1-based position in its
    document (TRIM-KV, arXiv 2512.03324). "excess", as in the authors' released code: the mean of
    max(0, S_t - M) / max(t - M, 1) over the steps of a row where S_t > M only, and then over the rows, so that it does
    not matter which rows are computed together.

    With scope="model" there is one S_t for each step, the mean over all layers and KV heads: some may hold more than M
    where others hold less, as calibrated budgets let them.

    Args:
        log_beta: fp32 [B, H, T] of each gated layer, 0 at protected tokens.
        memory_size: M, in entries per KV head.
        document_ids: int64 [B, T]; steps of padding (-1) are left out. None: every row is one document.

    Raises:
        ValueError: for an empty list, a memory_size below 1, or an unknown normalisation.
    """
    if not log_beta:
        raise ValueError("log_beta is an empty list: the capacity loss needs at least one gated layer.")
    if isinstance(memory_size, bool) or not isinstance(memory_size, int) or memory_size < 1:
        raise ValueError(f"memory_size must be a whole number of entries, 1 or more, not {memory_size!r}.")
    if normalisation not in get_args(CapacityNormalisation):
        raise ValueError(f"normalisation must be one of {get_args(CapacityNormalisation)}, not {normalisation!r}.")
    if scope not in get_args(CapacityScope):
        raise ValueError(f"scope must be one of {get_args(CapacityScope)}, not {scope!r}.")

    home, rows = log_beta[0].device, len(log_beta[0])
    total = torch.zeros(rows, device=home)
    steps = torch.zeros(rows, dtype=torch.int64, device=home)
    is_row = torch.zeros(rows, dtype=torch.bool, device=home)
    mean_masses: dict[int, torch.Tensor] = {}
    pooled = torch.zeros(1, device=home)
    for layers, mass, documents in retained_masses(log_beta, document_ids):  # [B, L, H, T], 0 at padding
        if documents is None:
            documents = torch.zeros(mass.shape[0], mass.shape[3], dtype=torch.int64, device=mass.device)
        is_row = is_row | (documents >= 0).any(1).to(home)
        steps_of_layer = ((documents >= 0).sum() * mass.shape[2]).clamp(min=1)
        mean_masses |= zip(layers, (mass.detach().sum((0, 2, 3)) / steps_of_layer).to(home).unbind(), strict=True)
        if scope == "model":
            pooled = pooled + mass.sum((1, 2)).to(home)  # [B, T]
        else:
            excess, counted = _excess(mass.flatten(1, 2), memory_size, documents, normalisation)
            total, steps = total + excess.to(home), steps + counted.to(home)
    if scope == "model":
        heads = sum(layer.shape[1] for layer in log_beta)
        ids = torch.zeros_like(pooled, dtype=torch.int64) if document_ids is None else document_ids.to(home)
        total, steps = _excess(pooled[:, None] / heads, memory_size, ids, normalisation)
    retained_mass = torch.stack([mean_masses[layer] for layer in range(len(log_beta))])
    # without a single step, or a step above M, there is nothing to push down: 0 rather than 0 / 0
    if normalisation == "excess":
        return CapacityLoss((total / steps.clamp(min=1)).sum() / is_row.sum().clamp(min=1), retained_mass)
    return CapacityLoss(total.sum() / steps.sum().clamp(min=1), retained_mass)


def _excess(
    mass: torch.Tensor, memory_size: int, documents: torch.Tensor, normalisation: CapacityNormalisation
) -> tuple[torch.Tensor, torch.Tensor]:
    """Sums of relative excesses and how many steps they are over, [B] each; mass is [B, N, T], documents [B, T]."""
    length = document_offsets(documents)[:, None] + 1  # t
    excess = (mass - memory_size).clamp(min=0)
    counted = (documents >= 0)[:, None].expand_as(mass)
    if normalisation == "excess":
        length = (length - memory_size).clamp(min=1)
        counted = excess > 0
    return (excess / length).sum((1, 2)), counted.sum((1, 2))
