"""The loss that makes gates forget."""

from collections.abc import Sequence
from typing import Literal, NamedTuple, get_args

import torch

from retention_gates.gates.documents import document_offsets
from retention_gates.kernels.retention_sum import retention_sum

CapacityNormalisation = Literal["length", "excess"]


class CapacityLoss(NamedTuple):
    loss: torch.Tensor  # scalar
    retained_mass: torch.Tensor  # [layers], mean S_t over KV heads and steps, in tokens; detached


def capacity_loss(
    log_beta: Sequence[torch.Tensor],
    memory_size: int,
    *,
    document_ids: torch.Tensor | None = None,
    normalisation: CapacityNormalisation = "length",
) -> CapacityLoss:
    """What the gates would hold above `memory_size` entries per KV head, relative to what there is to hold.

    "length": the mean over layers, KV heads and steps of max(0, S_t - M) / t, t the step's 1-based position in its
    document (TRIM-KV, arXiv 2512.03324). "excess", as in the authors' released code: the mean of
    max(0, S_t - M) / max(t - M, 1) over the steps where S_t > M only.

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

    first = log_beta[0]
    documents = (
        first.new_zeros(first.shape[0], first.shape[2], dtype=torch.int64) if document_ids is None else document_ids
    )
    is_step = documents[:, None, :] >= 0  # [B, 1, T]
    length = document_offsets(documents)[:, None, :] + 1  # t
    total = first.new_zeros(())
    steps = first.new_zeros((), dtype=torch.int64)
    retained_mass = []
    for layer in log_beta:
        mass = retention_sum(layer, document_ids=document_ids)  # [B, H, T], 0 at padding
        excess = (mass - memory_size).clamp(min=0)
        counted = is_step.expand_as(mass)
        retained_mass.append(mass.detach().sum() / counted.sum().clamp(min=1))
        if normalisation == "length":
            total = total + (excess / length).sum()
        else:
            total = total + (excess / (length - memory_size).clamp(min=1)).sum()
            counted = excess > 0
        steps = steps + counted.sum()
    # without a single step, or a step above M, there is nothing to push down: 0 rather than 0 / 0
    return CapacityLoss(total / steps.clamp(min=1), torch.stack(retained_mass))
