"""Eviction in place as one Triton kernel per layer and token, an operator that torch.compile and graphs take."""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from retention_gates.kernels.checks import with_unit_stride
from retention_gates.kernels.dispatch import on_own_device
from retention_gates.kernels.gate_evict.layout import device_offsets

SLOTS_PER_WARP = 256
MOST_WARPS = 16
LARGEST_BLOCK = 8192  # slots in registers at a time; a longer head takes several rounds

# `seen` counts, above this bit, the programs that have read it: the last one leaves the next step's number there
ARRIVAL: tl.constexpr = tl.constexpr(1 << 40)
NEVER: tl.constexpr = tl.constexpr((1 << 63) - 1)  # the key of who may not go
OLDEST: tl.constexpr = tl.constexpr((1 << 32) - 1)
INF: tl.constexpr = tl.constexpr(float("inf"))


def gate_evict(
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
    for name, tensor in (("keys", keys), ("values", values), ("score", score), ("positions", positions)):
        if not tensor.is_contiguous():
            raise ValueError(
                f"{name} has strides {tensor.stride()}; the fused kernel writes to contiguous state only."
            )
    _gate_evict(
        keys,
        values,
        score,
        positions,
        pending,
        start,
        seen,
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
    block = min(LARGEST_BLOCK, max(16, triton.next_power_of_2(layout.largest)))
    source = new_score
    if source is None:
        assert gate_hidden is not None
        source = with_unit_stride(gate_hidden)
    mask = None if padding_mask is None else with_unit_stride(padding_mask).view(torch.uint8)
    new_key, new_value = with_unit_stride(new_key), with_unit_stride(new_value)
    gate_weight, gate_bias, protected, recent = (
        None if x is None else x.contiguous() for x in (gate_weight, gate_bias, protected, recent)
    )
    _step[heads, batch](
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
        BD=triton.next_power_of_2(head_dim),
        BDV=triton.next_power_of_2(values.shape[2]),
        BG=1 if gate_hidden is None else triton.next_power_of_2(gate_hidden.shape[1]),
        BS=1 if protected is None else triton.next_power_of_2(len(protected)),
        num_warps=min(MOST_WARPS, max(1, block // SLOTS_PER_WARP)),
    )


@_gate_evict.register_fake
def _(*arguments):
    return None


@triton.jit
def _log1p(x):
    """log(1 + x) for 0 <= x <= 1, to some units of the last place: 2 artanh(x / (2 + x)) as its series."""
    s = x / (2.0 + x)  # at most 1/3: the first term left out is below 2^-26 of the sum
    q = s * s
    series = 1.0 / 15.0
    series = series * q + 1.0 / 13.0
    series = series * q + 1.0 / 11.0
    series = series * q + 1.0 / 9.0
    series = series * q + 1.0 / 7.0
    series = series * q + 1.0 / 5.0
    series = series * q + 1.0 / 3.0
    return 2.0 * s * (series * q + 1.0)


@triton.jit
def _log_sigmoid(x):
    return tl.minimum(x, 0.0) - _log1p(tl.exp(-tl.abs(x)))


@triton.jit
def _key(score, age, LINEAR_IN_AGE: tl.constexpr):
    """One integer in the order of (priority, position): the priority's bits above, the age below, the oldest first."""
    if LINEAR_IN_AGE:
        priority = age.to(tl.float32) * score
    else:
        priority = score
    # bits in the order of the numbers; adding 0 makes -0 equal 0
    order = (priority + 0.0).to(tl.int32, bitcast=True)
    order = order ^ ((order >> 31) & 0x7FFFFFFF)
    return (order.to(tl.int64) << 32) | (OLDEST - tl.minimum(age, OLDEST))


@triton.jit
def _merge(key_a, slot_a, first_a, empties_a, key_b, slot_b, first_b, empties_b):
    is_b = key_b < key_a
    key, slot = tl.where(is_b, key_b, key_a), tl.where(is_b, slot_b, slot_a)
    return key, slot, tl.minimum(first_a, first_b), empties_a + empties_b


@triton.jit
def _lower(key_a, slot_a, key_b, slot_b):
    is_b = key_b < key_a
    return tl.where(is_b, key_b, key_a), tl.where(is_b, slot_b, slot_a)


@triton.jit(do_not_specialize=["mask_width", "buffer_size"])
def _step(
    keys,  # [B, N, D]
    values,  # [B, N, Dv]
    score,  # [B, N]
    positions,  # [B, N]
    pending,  # [B, N]
    start,  # [B]
    seen,  # []
    new_key,  # [B, H, 1, D]
    new_value,  # [B, H, 1, Dv]
    source,  # [B, H], the score, or [B, GATE_WIDTH], the gate's hidden activations
    gate_weight,  # [H, GATE_WIDTH]
    gate_bias,  # [H]
    padding_mask,  # [B, mask_width]
    protected,  # [SPANS, 2]
    recent,  # [H]
    offsets,  # [H + 1]
    size,  # of every head, if UNIFORM
    slots,
    mask_width,
    key_stride_b,
    key_stride_h,
    value_stride_b,
    value_stride_h,
    source_stride_b,
    source_stride_h,
    mask_stride,
    buffer_size,
    D: tl.constexpr,
    DV: tl.constexpr,
    GATE_WIDTH: tl.constexpr,
    SPANS: tl.constexpr,
    HAS_MASK: tl.constexpr,
    HAS_RECENT: tl.constexpr,
    UNIFORM: tl.constexpr,
    LINEAR_IN_AGE: tl.constexpr,
    ONE_VICTIM: tl.constexpr,
    BLOCK: tl.constexpr,
    BD: tl.constexpr,
    BDV: tl.constexpr,
    BG: tl.constexpr,
    BS: tl.constexpr,
):
    head, row = tl.program_id(0), tl.program_id(1)
    if UNIFORM:
        begin = head * size
    else:
        begin = tl.load(offsets + head)
        size = tl.load(offsets + head + 1) - begin
    base = row.to(tl.int64) * slots + begin
    score += base
    positions += base
    pending += base

    # everything that needs no other number is asked for before anything is waited for
    index = tl.arange(0, BLOCK)
    held = tl.load(positions + index, mask=index < size, other=-1)
    marked = tl.load(pending + index, mask=index < size, other=0)
    scores = tl.load(score + index, mask=index < size, other=0.0)
    column, value_column = tl.arange(0, BD), tl.arange(0, BDV)
    key_row = tl.load(
        new_key + row.to(tl.int64) * key_stride_b + head * key_stride_h + column, mask=column < D, other=0.0
    )
    value_row = tl.load(
        new_value + row.to(tl.int64) * value_stride_b + head * value_stride_h + value_column,
        mask=value_column < DV,
        other=0.0,
    )
    youngest = tl.load(recent + head) if HAS_RECENT else 0
    first_token = tl.load(start + row)
    is_real = True
    if HAS_MASK:
        padding_mask += row.to(tl.int64) * mask_stride
        is_real = tl.load(padding_mask + mask_width - 1) != 0
    if GATE_WIDTH > 0:
        unit = tl.arange(0, BG)
        hidden = tl.load(source + row.to(tl.int64) * source_stride_b + unit, mask=unit < GATE_WIDTH, other=0.0)
        weight = tl.load(gate_weight + head * GATE_WIDTH + unit, mask=unit < GATE_WIDTH, other=0.0)
        bias = tl.load(gate_bias + head)
    else:
        new_score = tl.load(source + row.to(tl.int64) * source_stride_b + head * source_stride_h)
    if SPANS > 0:
        span = tl.arange(0, BS)
        span_start = tl.load(protected + 2 * span, mask=span < SPANS, other=0)
        span_stop = tl.load(protected + 2 * span + 1, mask=span < SPANS, other=0)

    # One atomic reads the step and says who is last to have read it, so that nobody reads what that one writes.
    programs = tl.num_programs(0) * tl.num_programs(1)
    clock = tl.atomic_add(seen, ARRIVAL, sem="relaxed")
    step = clock & (ARRIVAL - 1)
    tl.store(seen, step + 1, mask=clock - step == (programs - 1).to(tl.int64) * ARRIVAL)

    if GATE_WIDTH > 0:
        new_score = _log_sigmoid(tl.sum(hidden.to(tl.float32) * weight, 0) + bias)
    if HAS_MASK:
        # a row that has not begun yet; whoever reads this after another program's write finds it done
        begins_later = (first_token == step) & (is_real == 0)
        first_token += begins_later.to(tl.int64)
        tl.store(start + row, first_token, mask=begins_later)
    if SPANS > 0:
        offset = step - first_token
        inside = (offset >= span_start) & (offset < span_stop)
        new_score = tl.where(tl.max(inside.to(tl.int32), 0) > 0, INF, new_score)

    lowest = NEVER
    victim = 0
    first_empty = size
    empties = 0
    for block in range(0, size, BLOCK):
        slot = block + index
        gone = marked != 0
        if HAS_MASK:  # a later turn's mask tells what only filled up a row that had ended
            looked_up = (held >= 0) & (held < mask_width - 1)
            gone |= looked_up & (tl.load(padding_mask + held, mask=looked_up, other=1) == 0)
        tl.store(positions + slot, -1, mask=gone)
        tl.store(pending + slot, 0, mask=marked != 0)
        held = tl.where(gone, -1, held)
        age = step - held
        may_go = (held >= 0) & (scores != INF)
        if HAS_RECENT:
            may_go &= age >= youngest
        key = tl.where(may_go, _key(scores, age, LINEAR_IN_AGE), NEVER)
        is_empty = (held < 0) & (slot < size)
        empty_slot = tl.where(is_empty, slot, size)
        key, key_slot, empty_slot, count = tl.reduce((key, slot, empty_slot, is_empty.to(tl.int32)), 0, _merge)
        lowest, victim, first_empty, empties = _merge(
            lowest, victim, first_empty, empties, key, key_slot, empty_slot, count
        )
        slot += BLOCK
        held = tl.load(positions + slot, mask=slot < size, other=-1)
        marked = tl.load(pending + slot, mask=slot < size, other=0)
        scores = tl.load(score + slot, mask=slot < size, other=0.0)

    target = tl.where(empties == 0, 0, first_empty)  # there is one in every state that the ops leave behind
    tl.debug_barrier()  # what was freed above is written over below
    entry = base + target
    tl.store(keys + entry * D + column, key_row, mask=is_real & (column < D))
    tl.store(values + entry * DV + value_column, value_row, mask=is_real & (value_column < DV))
    tl.store(score + target, new_score, mask=is_real)
    tl.store(positions + target, step, mask=is_real)
    if empties - tl.where(is_real, 1, 0) <= 0:
        new_may_go = (is_real != 0) & (new_score != INF)
        if HAS_RECENT:
            new_may_go &= youngest <= 0
        own_key = tl.where(new_may_go, _key(new_score, step - step, LINEAR_IN_AGE), NEVER)
        lowest, victim = _lower(lowest, victim, own_key, target)
        tl.store(pending + victim, 1, mask=lowest != NEVER)
        if not ONE_VICTIM:
            tl.debug_barrier()  # the new entry is read with the others
            for _ in range(1, buffer_size):
                previous = lowest
                lowest = NEVER
                for block in range(0, size, BLOCK):
                    slot = block + index
                    held = tl.load(positions + slot, mask=slot < size, other=-1)
                    scores = tl.load(score + slot, mask=slot < size, other=0.0)
                    age = step - held
                    may_go = (held >= 0) & (scores != INF)
                    if HAS_RECENT:
                        may_go &= age >= youngest
                    key = tl.where(may_go, _key(scores, age, LINEAR_IN_AGE), NEVER)
                    key, key_slot = tl.reduce((tl.where(key > previous, key, NEVER), slot), 0, _lower)
                    lowest, victim = _lower(lowest, victim, key, key_slot)
                tl.store(pending + victim, 1, mask=lowest != NEVER)
