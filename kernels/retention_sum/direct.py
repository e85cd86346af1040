"""The kernels that write S_t and its gradient: near ages term by term, far ages, if any, from the nodes' states."""

import triton
import triton.language as tl

from retention_gates.kernels.retention_sum.rates import COUNTS, locate

LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def add_kept(total, lost, part):
    """total + part, and what rounding lost of it (Kahan). A thousand terms of 1 - 2e-5 would else count 1 each."""
    wanted = part - lost
    result = total + wanted
    return result, (result - total) - wanted


@triton.jit(do_not_specialize=COUNTS)
def write_sums(
    log_beta,  # [O * ROWS, T]
    starts,  # [B, T]
    states,  # [O, chunks, nodes], after each chunk
    decays,  # [nodes, 2 CHUNK + 1]
    out,  # [splits, O, T]
    tokens,
    chunks,
    rows,
    rows_per_split,
    sums_per_batch,
    nodes,
    FAR: tl.constexpr,
    PACKED: tl.constexpr,
    CHUNK: tl.constexpr,
    CHUNKS: tl.constexpr,
    UNROLL: tl.constexpr,
):
    """S of CHUNKS * CHUNK steps; with FAR, only what is one or two chunks old or younger is summed term by term."""
    BLOCK: tl.constexpr = CHUNK * CHUNKS
    sum_id = tl.program_id(0).to(tl.int64)
    split = tl.program_id(2)
    step = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = step < tokens
    start = tl.zeros((BLOCK,), tl.int32)
    if PACKED:
        start = tl.load(starts + (sum_id // sums_per_batch) * tokens + step, mask=inside, other=0)
    first = start
    if FAR:
        first = tl.maximum(start, (step // CHUNK - 1) * CHUNK)
    span = tl.where(inside, step - first, -1)  # the greatest age that is summed here; negative at padding
    greatest = tl.max(span, 0)

    total = tl.zeros((BLOCK,), tl.float32)
    for row in range(split * rows_per_split, tl.minimum((split + 1) * rows_per_split, rows)):
        ours = log_beta + (sum_id * rows + row) * tokens
        mass = tl.where(span >= 0, 1.0, 0.0)
        lost = tl.zeros((BLOCK,), tl.float32)
        for base in range(1, greatest + 1, UNROLL):
            part = tl.zeros((BLOCK,), tl.float32)
            for more in tl.static_range(UNROLL):
                age = base + more
                rate = tl.load(ours + step - age, mask=age <= span, other=-1e4)
                part += tl.exp2(rate * (age * LOG2E))
            mass, lost = add_kept(mass, lost, part)
        total += mass

    if FAR:
        if split == 0:
            chunk = tl.program_id(1) * CHUNKS + tl.arange(0, CHUNKS)
            age = CHUNK + 1 + tl.arange(0, CHUNK)  # from the end of the chunk before the previous one
            far = tl.zeros((CHUNKS, CHUNK), tl.float32)
            for base in range(0, nodes, 32):
                node = base + tl.arange(0, 32)
                state = tl.load(
                    states + (sum_id * chunks + chunk[:, None] - 2) * nodes + node[None, :],
                    mask=((chunk >= 2) & (chunk < chunks))[:, None] & (node < nodes)[None, :],
                    other=0.0,
                )
                decay = tl.load(
                    decays + node[:, None] * (2 * CHUNK + 1) + age[None, :], mask=(node < nodes)[:, None], other=0.0
                )
                far = tl.dot(state, decay, far, input_precision="tf32x3")
            reaches = start < (step // CHUNK - 1) * CHUNK
            total += tl.where(reaches, tl.reshape(far, (BLOCK,)), 0.0)
    tl.store(out + (split * tl.num_programs(0).to(tl.int64) + sum_id) * tokens + step, total, mask=inside)


@triton.jit(do_not_specialize=COUNTS)
def write_gradients(
    log_beta,  # [O * ROWS, T]
    ends,  # [B, T]
    gradients,  # [O, T], of S
    states,  # [O, chunks, nodes]: sums of gradient * decay before each chunk
    aged_states,  # the same of gradient * age * decay
    out,  # [O * ROWS, T]
    tokens,
    chunks,
    rows,
    sums_per_batch,
    intervals,
    offset,
    lowest,
    per_octave,
    greatest_rate,
    FAR: tl.constexpr,
    PACKED: tl.constexpr,
    ORDER: tl.constexpr,
    ROOTS: tl.constexpr,
    SCALES: tl.constexpr,
    CHUNK: tl.constexpr,
    CHUNKS: tl.constexpr,
    UNROLL: tl.constexpr,
):
    """d log_beta of CHUNKS * CHUNK tokens of one row: sum over later steps of gradient * age * decay."""
    BLOCK: tl.constexpr = CHUNK * CHUNKS
    row = tl.program_id(0).to(tl.int64)
    sum_id = row // rows
    token = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = token < tokens
    end = tl.where(inside, tokens, 0)
    if PACKED:
        end = tl.load(ends + (sum_id // sums_per_batch) * tokens + token, mask=inside, other=0)
    far_start = (token // CHUNK + 2) * CHUNK
    last = end
    if FAR:
        last = tl.minimum(end, far_start)
    span = last - 1 - token
    greatest = tl.max(span, 0)

    rate = tl.load(log_beta + row * tokens + token, mask=inside, other=0.0)
    ours = gradients + sum_id * tokens
    beta = tl.exp2(rate * LOG2E)
    total = tl.zeros((BLOCK,), tl.float32)
    lost = tl.zeros((BLOCK,), tl.float32)
    for base in range(1, greatest + 1, UNROLL):
        # one exponential for UNROLL ages, then products: few enough for their rounding to stay below 1e-6
        decay = tl.exp2(rate * (base * LOG2E))
        part = tl.zeros((BLOCK,), tl.float32)
        for more in tl.static_range(UNROLL):
            age = base + more
            gradient = tl.load(ours + token + age, mask=age <= span, other=0.0)
            part += decay * (gradient * age)
            decay *= beta
        total, lost = add_kept(total, lost, part)

    if FAR:
        reaches = (end > far_start) & (-rate < greatest_rate)
        interval, x = locate(rate, offset, lowest, per_octave, intervals)
        age = (far_start - token).to(tl.float32)
        where = (sum_id * chunks + token // CHUNK + 2) * (intervals * ORDER) + interval * ORDER
        far = tl.zeros((BLOCK,), tl.float32)
        for q in tl.static_range(ORDER):
            weight = tl.full((BLOCK,), SCALES[q], tl.float32)
            for r in tl.static_range(ORDER):
                if r != q:
                    weight *= x - ROOTS[r]
            state = tl.load(states + where + q, mask=reaches, other=0.0)
            aged = tl.load(aged_states + where + q, mask=reaches, other=0.0)
            far += weight * (aged + age * state)
        total += tl.where(reaches, tl.exp2(rate * (age * LOG2E)) * far, 0.0)
    tl.store(out + row * tokens + token, total, mask=inside)
