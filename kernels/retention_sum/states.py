"""The kernels that carry what is far: tokens and gradients projected on nodes, chunk by chunk, and their scans."""

import triton
import triton.language as tl

from retention_gates.kernels.retention_sum.rates import COUNTS, locate

LOG2E = tl.constexpr(1.4426950408889634)
NODE_BLOCK = tl.constexpr(32)


@triton.jit(do_not_specialize=COUNTS)
def project_tokens(
    log_beta,  # [O * ROWS, T]
    starts,  # [B, T]
    other_roots,  # [ORDER - 1, ORDER]
    scale,  # [ORDER]
    out,  # [splits, O, chunks, nodes]
    tokens,
    chunks,
    rows,
    rows_per_split,
    sums_per_batch,
    intervals,
    offset,
    lowest,
    per_octave,
    greatest_rate,
    PACKED: tl.constexpr,
    PADDED_INTERVALS: tl.constexpr,
    ORDER: tl.constexpr,
    CHUNK: tl.constexpr,
    CHUNKS: tl.constexpr,
):
    """Weight of every node in a chunk: sum over its tokens of decay to the chunk's end * interpolation weight."""
    sum_id = tl.program_id(0).to(tl.int64)
    split = tl.program_id(2)
    q = tl.arange(0, ORDER)
    p = tl.arange(0, PADDED_INTERVALS)
    slot = p[:, None] * ORDER + q[None, :]
    for chunk in range(tl.program_id(1) * CHUNKS, tl.minimum((tl.program_id(1) + 1) * CHUNKS, chunks)):
        token = chunk * CHUNK + tl.arange(0, CHUNK)
        last = chunk * CHUNK + CHUNK - 1
        inside = token < tokens
        if PACKED:
            # only the document that is open at the chunk's end goes on; a last chunk cut short is never used
            batch = sum_id // sums_per_batch
            start = tl.load(starts + batch * tokens + last, mask=last < tokens, other=tokens)
            inside = inside & (token >= start)
        total = tl.zeros((PADDED_INTERVALS, ORDER), tl.float32)
        for row in range(split * rows_per_split, tl.minimum((split + 1) * rows_per_split, rows)):
            rate = tl.load(log_beta + (sum_id * rows + row) * tokens + token, mask=inside, other=-1e4)
            interval, x = locate(rate, offset, lowest, per_octave, intervals)
            decay = tl.exp2(rate * ((last - token).to(tl.float32) * LOG2E))
            decay = tl.where(-rate < greatest_rate, decay, 0.0)
            # a rate above the greatest lies outside every interval, where weights could overflow
            x = tl.minimum(x, 1.0)
            weight = decay[:, None] * tl.load(scale + q)[None, :]  # [CHUNK, ORDER]
            for r in tl.static_range(ORDER - 1):
                weight *= x[:, None] - tl.load(other_roots + r * ORDER + q)[None, :]
            is_here = interval[None, :, None] == p[:, None, None]
            total += tl.sum(tl.where(is_here, weight[None, :, :], 0.0), 1)
        where = (split * tl.num_programs(0).to(tl.int64) + sum_id) * chunks + chunk
        tl.store(out + where * (intervals * ORDER) + slot, total, mask=(p < intervals)[:, None])


@triton.jit(do_not_specialize=COUNTS)
def project_gradients(
    gradients,  # [O, T]
    starts,  # [B, T]
    decays,  # [nodes, 2 CHUNK + 1]
    out,  # [O, chunks, nodes]
    aged_out,
    tokens,
    chunks,
    sums_per_batch,
    nodes,
    PACKED: tl.constexpr,
    CHUNK: tl.constexpr,
    CHUNKS: tl.constexpr,
):
    """Sums over a chunk's steps of gradient * decay and gradient * age * decay, ages from the chunk's first step."""
    sum_id = tl.program_id(0).to(tl.int64)
    chunk = tl.program_id(1) * CHUNKS + tl.arange(0, CHUNKS)
    age = tl.arange(0, CHUNK)
    step = chunk[:, None] * CHUNK + age[None, :]
    inside = step < tokens
    if PACKED:
        # only the document that is open at the chunk's first step began before it
        start = tl.load(starts + (sum_id // sums_per_batch) * tokens + step, mask=inside, other=tokens)
        inside = inside & (start <= chunk[:, None] * CHUNK)
    gradient = tl.load(gradients + sum_id * tokens + step, mask=inside, other=0.0)
    aged = gradient * age.to(tl.float32)[None, :]
    for base in range(0, nodes, 32):
        node = base + tl.arange(0, 32)
        decay = tl.load(
            decays + node[None, :] * (2 * CHUNK + 1) + age[:, None], mask=(node < nodes)[None, :], other=0.0
        )
        where = (sum_id * chunks + chunk[:, None]) * nodes + node[None, :]
        mask = (chunk < chunks)[:, None] & (node < nodes)[None, :]
        tl.store(out + where, tl.dot(gradient, decay, input_precision="tf32x3"), mask=mask)
        tl.store(aged_out + where, tl.dot(aged, decay, input_precision="tf32x3"), mask=mask)


@triton.jit
def _then(decay, value, later_decay, later_value):
    return decay * later_decay, later_value + later_decay * value


@triton.jit
def _then_aged(decay, value, aged, later_decay, later_value, later_aged):
    return decay * later_decay, later_value + later_decay * value, later_aged + later_decay * aged


@triton.jit(do_not_specialize=COUNTS)
def scan_tokens(
    states,  # [O, chunks, nodes], in place: a chunk's own weights -> the state after it
    starts,  # [B, T]
    decay,  # fp64 [nodes], over a chunk
    tokens,
    chunks,
    sums_per_batch,
    nodes,
    PACKED: tl.constexpr,
    CHUNK: tl.constexpr,
    CHUNKS: tl.constexpr,
):
    """State after chunk c = decay * state after chunk c - 1 (0 if no document spans c) + weights of c, in fp64."""
    sum_id = tl.program_id(0).to(tl.int64)
    node = tl.program_id(1) * NODE_BLOCK + tl.arange(0, NODE_BLOCK)
    own_decay = tl.load(decay + node, mask=node < nodes, other=0.0)
    carry = tl.zeros((NODE_BLOCK,), tl.float64)
    place = tl.arange(0, CHUNKS)
    for base in range(0, chunks, CHUNKS):
        chunk = base + place
        where = states + (sum_id * chunks + chunk[:, None]) * nodes + node[None, :]
        mask = (chunk < chunks)[:, None] & (node < nodes)[None, :]
        value = tl.load(where, mask=mask, other=0.0).to(tl.float64)
        decays = tl.zeros((CHUNKS, NODE_BLOCK), tl.float64) + own_decay[None, :]
        if PACKED:
            last = chunk * CHUNK + CHUNK - 1
            start = tl.load(starts + (sum_id // sums_per_batch) * tokens + last, mask=last < tokens, other=tokens)
            decays = tl.where((start < chunk * CHUNK)[:, None], decays, 0.0)
        decays, value = tl.associative_scan((decays, value), 0, _then)
        value += decays * carry[None, :]
        tl.store(where, value.to(tl.float32), mask=mask)
        carry = tl.sum(tl.where((place == CHUNKS - 1)[:, None], value, 0.0), 0)


@triton.jit(do_not_specialize=COUNTS)
def scan_gradients(
    states,  # [O, chunks, nodes], in place: a chunk's own sums -> those of it and all later chunks, before it
    aged_states,
    starts,
    decay,
    tokens,
    chunks,
    sums_per_batch,
    nodes,
    PACKED: tl.constexpr,
    CHUNK: tl.constexpr,
    CHUNKS: tl.constexpr,
):
    """The scan from the right. Ages are counted from step 0 inside the scan, so that both sums decay alike."""
    sum_id = tl.program_id(0).to(tl.int64)
    node = tl.program_id(1) * NODE_BLOCK + tl.arange(0, NODE_BLOCK)
    own_decay = tl.load(decay + node, mask=node < nodes, other=0.0)
    carry = tl.zeros((NODE_BLOCK,), tl.float64)
    aged_carry = tl.zeros((NODE_BLOCK,), tl.float64)
    place = tl.arange(0, CHUNKS)
    for base in range(0, chunks, CHUNKS):
        chunk = chunks - 1 - base - place
        where = (sum_id * chunks + chunk[:, None]) * nodes + node[None, :]
        mask = (chunk >= 0)[:, None] & (node < nodes)[None, :]
        first = (chunk * CHUNK).to(tl.float64)[:, None]
        value = tl.load(states + where, mask=mask, other=0.0).to(tl.float64)
        aged = tl.load(aged_states + where, mask=mask, other=0.0).to(tl.float64) + first * value
        decays = tl.zeros((CHUNKS, NODE_BLOCK), tl.float64) + own_decay[None, :]
        if PACKED:
            after = (chunk + 1) * CHUNK
            exists = (chunk >= 0) & (after < tokens)
            start = tl.load(starts + (sum_id // sums_per_batch) * tokens + after, mask=exists, other=tokens)
            decays = tl.where((start <= chunk * CHUNK)[:, None], decays, 0.0)
        decays, value, aged = tl.associative_scan((decays, value, aged), 0, _then_aged)
        value += decays * carry[None, :]
        aged += decays * aged_carry[None, :]
        tl.store(states + where, value.to(tl.float32), mask=mask)
        tl.store(aged_states + where, (aged - first * value).to(tl.float32), mask=mask)
        is_last = (place == CHUNKS - 1)[:, None]
        carry = tl.sum(tl.where(is_last, value, 0.0), 0)
        aged_carry = tl.sum(tl.where(is_last, aged, 0.0), 0)
