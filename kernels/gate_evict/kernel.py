"""The Triton kernel of gate_evict: one program per head and row of the batch. See README.md."""

import triton
import triton.language as tl

# `seen` counts, above this bit, the programs that have read it: the last one leaves the next step's number there
ARRIVAL: tl.constexpr = tl.constexpr(1 << 40)
FAR: tl.constexpr = tl.constexpr(1 << 62)  # the position of a slot beyond a head's end: neither empty nor in a mask
NOBODY: tl.constexpr = tl.constexpr((1 << 32) - 1)  # the rank of entries that must stay; their priority is inf
INF: tl.constexpr = tl.constexpr(float("inf"))


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
def _priority(score, age, LINEAR_IN_AGE: tl.constexpr):
    """Returns the entry to evict: the lowest priority, of equal ones the lowest rank, that is position."""
    if LINEAR_IN_AGE:
        priority = age.to(tl.float32) * score
    else:
        priority = score
    return priority, (~age).to(tl.uint32)


@triton.jit
def _is_lower(priority_a, rank_a, priority_b, rank_b):
    return (priority_a < priority_b) | ((priority_a == priority_b) & (rank_a < rank_b))


@triton.jit
def _is_anybody(priority, rank):
    return (priority != INF) | (rank != NOBODY)


@triton.jit
def _lower(priority_a, rank_a, slot_a, priority_b, rank_b, slot_b):
    is_b = _is_lower(priority_b, rank_b, priority_a, rank_a)
    return tl.where(is_b, priority_b, priority_a), tl.where(is_b, rank_b, rank_a), tl.where(is_b, slot_b, slot_a)


@triton.jit
def _merge(
    priority_a, rank_a, slot_a, first_a, empties_a, dot_a, priority_b, rank_b, slot_b, first_b, empties_b, dot_b
):
    priority, rank, slot = _lower(priority_a, rank_a, slot_a, priority_b, rank_b, slot_b)
    return priority, rank, slot, tl.minimum(first_a, first_b), empties_a + empties_b, dot_a + dot_b


@triton.jit
def _read(positions, pending, score, slot, size, BLOCK: tl.constexpr, ROUNDS: tl.constexpr):
    """Returns the contents of the slots slot, slot + BLOCK, ...: ROUNDS tensors of each kind."""
    held: tl.tuple = ()
    marked: tl.tuple = ()
    scores: tl.tuple = ()
    for i in tl.static_range(ROUNDS):
        there = slot + i * BLOCK < size
        held += (tl.load(positions + slot + i * BLOCK, mask=there, other=FAR),)
        marked += (tl.load(pending + slot + i * BLOCK, mask=there, other=0),)
        scores += (tl.load(score + slot + i * BLOCK, mask=there, other=INF),)
    return held, marked, scores


@triton.jit
def _may_go(held, scores, age, youngest, HAS_RECENT: tl.constexpr):
    may_go = (held >= 0) & (scores != INF)
    if HAS_RECENT:
        may_go &= age >= youngest
    return may_go


@triton.jit
def _take(
    found,  # of each lane: lowest priority, its rank, its slot, first empty slot, count of empty ones
    entries,
    slot,
    positions,
    pending,
    padding_mask,
    mask_width,
    step,
    youngest,
    HAS_MASK: tl.constexpr,
    HAS_RECENT: tl.constexpr,
    LINEAR_IN_AGE: tl.constexpr,
    BLOCK: tl.constexpr,
    ROUNDS: tl.constexpr,
):
    """Frees what goes of the entries that were read, and adds the others to what was found before."""
    lowest, lowest_rank, victim, first_empty, empties = found
    for i in tl.static_range(ROUNDS):
        held, is_marked, scores = entries[0][i], entries[1][i] != 0, entries[2][i]
        gone = is_marked
        if HAS_MASK:  # a later turn's mask tells what only filled up a row that had ended
            looked_up = (held >= 0) & (held < mask_width - 1)
            gone |= looked_up & (tl.load(padding_mask + held, mask=looked_up, other=1) == 0)
        tl.store(positions + slot + i * BLOCK, -1, mask=gone)
        tl.store(pending + slot + i * BLOCK, 0, mask=is_marked)
        age = step - held
        priority, rank = _priority(scores, age, LINEAR_IN_AGE)
        is_lower = _is_lower(priority, rank, lowest, lowest_rank)
        is_lower &= _may_go(held, scores, age, youngest, HAS_RECENT) & ~gone
        lowest = tl.where(is_lower, priority, lowest)
        lowest_rank = tl.where(is_lower, rank, lowest_rank)
        victim = tl.where(is_lower, slot + i * BLOCK, victim)
        is_empty = (held < 0) | gone
        first_empty = tl.minimum(first_empty, tl.where(is_empty, slot + i * BLOCK, first_empty))
        empties += is_empty.to(tl.int32)
    return lowest, lowest_rank, victim, first_empty, empties


@triton.jit(do_not_specialize=["size", "slots", "mask_width", "buffer_size"])
def evict_step(
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
    ROUNDS: tl.constexpr,
    ONE_PASS: tl.constexpr,  # whether no head has more than BLOCK * ROUNDS slots
    GATE_ROUNDS: tl.constexpr,
    BD: tl.constexpr,
    BDV: tl.constexpr,
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
    entries = _read(positions, pending, score, index, size, BLOCK, ROUNDS)
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
        source += row.to(tl.int64) * source_stride_b
        gate_weight += head * GATE_WIDTH
        hidden: tl.tuple = ()
        weight: tl.tuple = ()
        for i in tl.static_range(GATE_ROUNDS):
            unit = index + i * BLOCK
            hidden += (tl.load(source + unit, mask=unit < GATE_WIDTH, other=0.0),)
            weight += (tl.load(gate_weight + unit, mask=unit < GATE_WIDTH, other=0.0),)
        bias = tl.load(gate_bias + head)
    else:
        new_score = tl.load(source + row.to(tl.int64) * source_stride_b + head * source_stride_h)
    if SPANS > 0:
        span = tl.arange(0, BS)
        span_start = tl.load(protected + 2 * span, mask=span < SPANS, other=0)
        span_stop = tl.load(protected + 2 * span + 1, mask=span < SPANS, other=0)

    # One atomic reads the step and counts the readers: the last of them writes, after all others have read.
    programs = tl.num_programs(0) * tl.num_programs(1)
    clock = tl.atomic_add(seen, ARRIVAL, sem="relaxed")
    step = clock & (ARRIVAL - 1)
    tl.store(seen, step + 1, mask=clock - step == (programs - 1).to(tl.int64) * ARRIVAL)

    if HAS_MASK:
        # a row that has not begun yet; whoever reads this after another program's write finds it done
        begins_later = (first_token == step) & (is_real == 0)
        first_token += begins_later.to(tl.int64)
        tl.store(start + row, first_token, mask=begins_later)
    none = tl.zeros((BLOCK,), tl.int32)
    found = (none + INF, none.to(tl.uint32) + NOBODY, none, none + size, none)
    state = (positions, pending, padding_mask, mask_width, step, youngest)
    found = _take(found, entries, index, *state, HAS_MASK, HAS_RECENT, LINEAR_IN_AGE, BLOCK, ROUNDS)
    if not ONE_PASS:
        for begin in range(BLOCK * ROUNDS, size, BLOCK * ROUNDS):
            slot = begin + index
            entries = _read(positions, pending, score, slot, size, BLOCK, ROUNDS)
            found = _take(found, entries, slot, *state, HAS_MASK, HAS_RECENT, LINEAR_IN_AGE, BLOCK, ROUNDS)
    products = tl.zeros((BLOCK,), tl.float32)  # of the gate, added up along with what is found
    for i in tl.static_range(GATE_ROUNDS):
        products += hidden[i].to(tl.float32) * weight[i]
    lowest, lowest_rank, victim, first_empty, empties, logit = tl.reduce(found + (products,), 0, _merge)
    if GATE_WIDTH > 0:
        new_score = _log_sigmoid(logit + bias)
    if SPANS > 0:
        offset = step - first_token
        inside = (offset >= span_start) & (offset < span_stop)
        new_score = tl.where(tl.max(inside.to(tl.int32), 0) > 0, INF, new_score)

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
        new_priority, new_rank = _priority(new_score, step - step, LINEAR_IN_AGE)
        is_lower = new_may_go & _is_lower(new_priority, new_rank, lowest, lowest_rank)
        lowest = tl.where(is_lower, new_priority, lowest)
        lowest_rank = tl.where(is_lower, new_rank, lowest_rank)
        victim = tl.where(is_lower, target, victim)
        tl.store(pending + victim, 1, mask=_is_anybody(lowest, lowest_rank))
        if not ONE_VICTIM:
            tl.debug_barrier()  # the new entry is read with the others
            for _ in range(1, buffer_size):
                previous, previous_rank = lowest, lowest_rank
                best = (none + INF, none.to(tl.uint32) + NOBODY, none)
                for begin in range(0, size, BLOCK * ROUNDS):
                    slot = begin + index
                    held, marked, scores = _read(positions, pending, score, slot, size, BLOCK, ROUNDS)
                    for i in tl.static_range(ROUNDS):
                        age = step - held[i]
                        priority, rank = _priority(scores[i], age, LINEAR_IN_AGE)
                        is_next = _may_go(held[i], scores[i], age, youngest, HAS_RECENT)
                        is_next &= _is_lower(previous, previous_rank, priority, rank)
                        priority, rank = tl.where(is_next, priority, INF), tl.where(is_next, rank, NOBODY)
                        best = _lower(*best, priority, rank, slot + i * BLOCK)
                lowest, lowest_rank, victim = tl.reduce(best, 0, _lower)
                tl.store(pending + victim, 1, mask=_is_anybody(lowest, lowest_rank))
