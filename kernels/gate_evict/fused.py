"""Eviction in place as one Triton kernel per layer and token, an operator that torch.compile and graphs take."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from triton import cdiv, next_power_of_2

from retention_gates.kernels.checks import with_unit_stride
from retention_gates.kernels.dispatch import on_own_device
from retention_gates.kernels.gate_evict.kernel import evict_step
from retention_gates.kernels.gate_evict.layout import SlotState, device_offsets

LANES = 32  # slots that a warp takes at once
SLOTS_PER_WARP = 128
MOST_WARPS = 16
# slots of a lane that are asked for before any is waited for, so that registers must hold them; one more than a power
# of two takes a budget that is one, with the slot for the next token
ROUNDS: tuple[int, ...] = (1, 2, 3, 5, 9, 16)
ROUNDS_OF_SEVERAL = 9  # where one pass is not enough: a loop of 16 takes 15 s to compile, of 9 4 s


def gate_evict(
    state: SlotState,
    new_key: Tensor,
    new_value: Tensor,
    new_score: Tensor | None,
    head_offsets: tuple[int, ...],
    *,
    linear_in_age: bool,
    buffer_size: int = 1,
    recent: Tensor | None = None,
    protected: Tensor | None = None,
    padding_mask: Tensor | None = None,
    gate_hidden: Tensor | None = None,
    gate_weight: Tensor | None = None,
    gate_bias: Tensor | None = None,
) -> None:
    """Arguments and effect as in the package's `gate_evict`; what it takes of a gate comes as three tensors."""
    for name, tensor in zip(state._fields[:4], state, strict=False):
        if not tensor.is_contiguous():
            raise ValueError(
                f"{name} has strides {tensor.stride()}; the fused kernel writes to contiguous state only."
            )
    _gate_evict(
        *state,
        new_key,
        new_value,
        new_score,
        gate_hidden,
        gate_weight,
        gate_bias,
        padding_mask,
        protected,
        recent,
        head_offsets,
        linear_in_age,
        buffer_size,
    )


def shape_of(largest: int) -> tuple[int, int, int]:
    """Warps of a program whose longest head has `largest` slots, rounds of a slot a lane in a pass, and passes."""
    warps = min(MOST_WARPS, next_power_of_2(max(1, largest // SLOTS_PER_WARP)))
    needed = cdiv(largest, warps * LANES)
    if needed > ROUNDS[-1]:
        rounds = min(ROUNDS_OF_SEVERAL, ROUNDS[-1])
    else:  # few different numbers: each is a kernel to compile, and calibrated budgets differ in every layer
        rounds = next(rounds for rounds in ROUNDS if rounds >= needed)
    return warps, rounds, cdiv(needed, rounds)


@torch.library.custom_op(
    "retention_gates::gate_evict",
    mutates_args=("keys", "values", "score", "positions", "pending", "start", "seen"),
)
@on_own_device
def _gate_evict(
    keys: Tensor,
    values: Tensor,
    score: Tensor,
    positions: Tensor,
    pending: Tensor,
    start: Tensor,
    seen: Tensor,
    new_key: Tensor,
    new_value: Tensor,
    new_score: Tensor | None,
    gate_hidden: Tensor | None,
    gate_weight: Tensor | None,
    gate_bias: Tensor | None,
    padding_mask: Tensor | None,
    protected: Tensor | None,
    recent: Tensor | None,
    head_offsets: Sequence[int],
    linear_in_age: bool,
    buffer_size: int,
) -> None:
    batch, heads, _, head_dim = new_key.shape
    layout = device_offsets(tuple(head_offsets), keys.device)
    warps, rounds, passes = shape_of(layout.largest)
    block = LANES * warps
    source = new_score
    if source is None:
        assert gate_hidden is not None
        source = with_unit_stride(gate_hidden)
    mask = None if padding_mask is None else with_unit_stride(padding_mask).view(torch.uint8)
    new_key, new_value = with_unit_stride(new_key), with_unit_stride(new_value)
    gate_weight, gate_bias, protected, recent = (
        None if x is None else x.contiguous() for x in (gate_weight, gate_bias, protected, recent)
    )
    evict_step[heads, batch](
        keys,
        values,
        score,
        positions,
        pending.view(torch.uint8),
        start,
        seen,
        new_key,
        new_value,
        source,
        gate_weight,
        gate_bias,
        mask,
        protected,
        recent,
        layout.offsets,
        layout.size,
        positions.shape[1],
        0 if mask is None else mask.shape[1],
        *new_key.stride()[:2],
        *new_value.stride()[:2],
        *source.stride(),
        0 if mask is None else mask.stride(0),
        buffer_size,
        D=head_dim,
        DV=values.shape[2],
        GATE_WIDTH=0 if gate_hidden is None else gate_hidden.shape[1],
        SPANS=0 if protected is None else len(protected),
        HAS_MASK=mask is not None,
        HAS_RECENT=recent is not None,
        UNIFORM=layout.size > 0,
        LINEAR_IN_AGE=linear_in_age,
        ONE_VICTIM=buffer_size == 1,
        BLOCK=block,
        ROUNDS=rounds,
        ONE_PASS=passes == 1,
        GATE_ROUNDS=0 if gate_hidden is None else cdiv(gate_hidden.shape[1], block),
        BD=next_power_of_2(head_dim),
        BDV=next_power_of_2(values.shape[2]),
        BS=1 if protected is None else next_power_of_2(len(protected)),
        num_warps=warps,
    )


@_gate_evict.register_fake
def _(*arguments: Any) -> None:
    pass
