"""The forward kernel: one program per block of queries and query head, online softmax over blocks of keys.

Logits are in units of q k, before `scale`: biases come divided by scale, and a weight is exp2(qk_scale * logit) with
qk_scale = scale * log2(e). So a bias can be what the matrix product starts from, which costs no adding.

Vectors come through the copy engine as matrices do: a masked load of 128 numbers is 250 instructions in each thread.
"""

import triton
import triton.language as tl


@triton.jit
def capped(logits, softcap):
    """softcap * tanh(logits / softcap)."""
    ratio = logits / softcap
    # tanh from exp2 of a number <= 0, which cannot overflow
    small = tl.math.exp2(-2.8853900817779268 * tl.abs(ratio))  # 2 log2(e)
    magnitude = (1.0 - small) / (1.0 + small)
    return softcap * tl.where(ratio < 0, -magnitude, magnitude)


@triton.jit
def load_rows(descriptor, batch, head, start, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Rows start..start+ROWS of [B, heads, T, columns]; what lies beyond the tensor is 0."""
    return tl.reshape(descriptor.load([batch, head, start, 0]), (ROWS, COLUMNS))


@triton.jit
def load_vector(descriptor, row, start, COUNT: tl.constexpr):
    """Numbers start..start+COUNT of a row of [rows, T]; what lies beyond the tensor is 0."""
    return tl.reshape(descriptor.load([row, start]), (COUNT,))


@triton.jit
def decay(rate, start, n, BM: tl.constexpr, BN: tl.constexpr, EXACT: tl.constexpr, GAUSSIAN: tl.constexpr):
    """age * rate, if GAUSSIAN age^2 * rate, [BM, BN] of keys n..n+BN for the queries start..start+BM."""
    column = tl.arange(0, BN)
    if EXACT:
        # products only: the sums below, fused into one instruction, are not 0 at age 0 if the rate is large
        age = ((start - n) + tl.arange(0, BM)[:, None] - column[None, :]).to(tl.float32)
        return age * age * rate[None, :] if GAUSSIAN else age * rate[None, :]
    # what the compiler can tell apart: a few numbers of the thread's own, and constants
    base = ((start - n) - (column & 7)).to(tl.float32) - (column & -8).to(tl.float32)
    row = tl.arange(0, BM).to(tl.float32)[:, None]
    if GAUSSIAN:
        return row * (row * rate[None, :] + (2.0 * base * rate)[None, :]) + (base * base * rate)[None, :]
    return row * rate[None, :] + (base * rate)[None, :]


@triton.jit
def _attend_block(
    accumulator,
    total,
    highest,
    query,
    keys,
    values,
    rates,
    UNTIL,
    batch,
    head,
    start,
    first,
    n,
    T,
    qk_scale,
    softcap,
    H: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BD: tl.constexpr,
    BDV: tl.constexpr,
    MASKED: tl.constexpr,
    SPANS: tl.constexpr,
    EVICTED: tl.constexpr,
    SOFTCAP: tl.constexpr,
    GAUSSIAN: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Adds keys n..n+BN to the running softmax of the queries start..start+BM."""
    row = batch * H + head
    bias = decay(load_vector(rates, row, n, BN), start, n, BM, BN, MASKED, GAUSSIAN)
    key = load_rows(keys, batch, head, n, BN, BD)
    if SOFTCAP:
        logits = capped(tl.dot(query, tl.trans(key), input_precision=PRECISION), softcap) + bias
    else:
        logits = tl.dot(query, tl.trans(key), bias, input_precision=PRECISION)  # [BM, BN]
    if MASKED:
        t = start + tl.arange(0, BM)
        i = n + tl.arange(0, BN)
        seen = t[:, None] >= i[None, :]
        if SPANS:
            seen = seen & (i[None, :] >= first[:, None])
        if EVICTED:
            until = tl.load(UNTIL + row.to(tl.int64) * T + i, mask=i < T, other=0)
            seen = seen & (t[:, None] < until[None, :])
        logits = tl.where(seen, logits, float("-inf"))
    higher = tl.maximum(highest, tl.max(logits, 1))
    if MASKED:
        # a row that has seen nothing yet: exp2 of -inf minus -inf would be NaN
        shift = tl.where(higher == float("-inf"), 0.0, higher)
    else:
        shift = higher
    # First the difference, which is exact at the maximum. Scaled first, it could overflow by its rounding where all
    # keys so far have faded beyond measure.
    weights = tl.math.exp2((logits - shift[:, None]) * qk_scale)
    shrink = tl.math.exp2((highest - shift) * qk_scale)
    total = total * shrink + tl.sum(weights, 1)
    accumulator = accumulator * shrink[:, None]
    value = load_rows(values, batch, head, n, BN, BDV)
    accumulator = tl.dot(weights.to(value.dtype), value, accumulator, input_precision=PRECISION)
    return accumulator, total, higher


@triton.jit
def attention_forward(
    queries,
    keys,
    values,
    outputs,
    rates,  # [B * H, T], log_beta over scale, or - log_beta^2 over scale if GAUSSIAN
    LSE,  # [B, HQ, lse_stride], log of the softmax's denominator over scale; inf for a row that sees nothing
    SINKS,  # [HQ], over scale
    FIRST,  # [B, T]
    UNTIL,  # [B, H, T]
    LISTS,  # int16 [B * H, query blocks, width]: blocks of keys that are not negligible
    COUNTS,  # [B * H, query blocks]
    T,
    lse_stride,
    width,
    qk_scale,
    softcap,
    HQ: tl.constexpr,
    G: tl.constexpr,
    BD: tl.constexpr,
    BDV: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    STAGES: tl.constexpr,
    SPANS: tl.constexpr,
    EVICTED: tl.constexpr,
    SKIPPING: tl.constexpr,
    SOFTCAP: tl.constexpr,
    GAUSSIAN: tl.constexpr,
    HAS_SINKS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    H: tl.constexpr = HQ // G
    block = tl.num_programs(1) - 1 - tl.program_id(1)  # the longest rows first
    batch = tl.program_id(0) // HQ
    query_head = tl.program_id(0) % HQ
    head = query_head // G
    start = block * BM
    t = start + tl.arange(0, BM)
    query = load_rows(queries, batch, query_head, start, BM, BD)
    if HAS_SINKS:
        highest = tl.zeros((BM,), tl.float32) + tl.load(SINKS + query_head)
        total = tl.full((BM,), 1.0, tl.float32)
    else:
        highest = tl.full((BM,), float("-inf"), tl.float32)
        total = tl.zeros((BM,), tl.float32)
    accumulator = tl.zeros((BM, BDV), tl.float32)

    first = t
    begin = 0  # of the blocks of keys that any query sees
    inner = 0  # of those that every query sees whole
    if SPANS:
        first = tl.load(FIRST + batch.to(tl.int64) * T + t, mask=t < T, other=T)
        begin = tl.min(first, 0) // BN * BN
        inner = tl.cdiv(tl.max(first, 0), BN) * BN
    if EVICTED:
        inner = start
    inner = tl.minimum(inner, start)
    # the masked blocks in front of the inner ones, the inner ones, the diagonal
    if EVICTED:
        for n in tl.range(begin, inner, BN):
            held = tl.max(tl.load(UNTIL + (batch * H + head).to(tl.int64) * T + n + tl.arange(0, BN)), 0) > start
            if held:
                accumulator, total, highest = _attend_block(
                    accumulator, total, highest, query, keys, values, rates, UNTIL, batch, head, start, first, n,
                    T, qk_scale, softcap, H, BM, BN, BD, BDV, True, SPANS, True, SOFTCAP, GAUSSIAN, PRECISION,
                )  # fmt: skip
    elif SPANS:
        for n in tl.range(begin, inner, BN, num_stages=STAGES):
            accumulator, total, highest = _attend_block(
                accumulator, total, highest, query, keys, values, rates, UNTIL, batch, head, start, first, n, T,
                qk_scale, softcap, H, BM, BN, BD, BDV, True, True, False, SOFTCAP, GAUSSIAN, PRECISION,
            )  # fmt: skip
    if SKIPPING:
        place = (batch * H + head) * tl.num_programs(1) + block
        LISTS += place.to(tl.int64) * width
        for k in tl.range(0, tl.load(COUNTS + place), num_stages=STAGES):
            n = tl.load(LISTS + k).to(tl.int32) * BN
            accumulator, total, highest = _attend_block(
                accumulator, total, highest, query, keys, values, rates, UNTIL, batch, head, start, first, n, T,
                qk_scale, softcap, H, BM, BN, BD, BDV, False, False, False, SOFTCAP, GAUSSIAN, PRECISION,
            )  # fmt: skip
    else:
        for n in tl.range(inner, start, BN, num_stages=STAGES):
            accumulator, total, highest = _attend_block(
                accumulator, total, highest, query, keys, values, rates, UNTIL, batch, head, start, first, n, T,
                qk_scale, softcap, H, BM, BN, BD, BDV, False, False, False, SOFTCAP, GAUSSIAN, PRECISION,
            )  # fmt: skip
    for n in tl.range(start, tl.minimum(start + BM, T), BN, num_stages=STAGES):
        accumulator, total, highest = _attend_block(
            accumulator, total, highest, query, keys, values, rates, UNTIL, batch, head, start, first, n, T,
            qk_scale, softcap, H, BM, BN, BD, BDV, True, SPANS, EVICTED, SOFTCAP, GAUSSIAN, PRECISION,
        )  # fmt: skip

    blind = total == 0.0
    total = tl.where(blind, 1.0, total)
    accumulator = accumulator / total[:, None]
    outputs.store([batch, query_head, start, 0], tl.reshape(accumulator.to(outputs.dtype), (1, 1, BM, BDV)))
    if SPANS:
        blind = blind | (first >= T)  # padding, which has a sink but must get no gradient
    lse = tl.where(blind, float("inf"), highest + tl.math.log2(total) / qk_scale)
    # what fills up the row is written too, so that the same call always gives the same tensor
    lse = tl.where(t < T, lse, 0.0)
    tl.store(LSE + tl.program_id(0).to(tl.int64) * lse_stride + t, lse, mask=t < lse_stride)
