"""The backward kernels: one pass for keys, values and log_beta, one for queries, both without atomics.

Each makes the weights again from the logits and the forward pass's log of the denominator. Every sum has one owner and
one order, so that two runs give the same bits.
"""

import triton
import triton.language as tl

from retention_gates.kernels.retention_attention.forward import capped, decay, load_rows, load_vector


@triton.jit
def output_times_gradient(
    OUTPUT,  # [B, HQ, T, Dv] with any strides, as GRADIENT
    GRADIENT,
    DELTA,  # [B, HQ, lse_stride]: sum over Dv
    o_batch,
    o_head,
    o_row,
    g_batch,
    g_head,
    g_row,
    T,
    lse_stride,
    DV,
    HQ: tl.constexpr,
    BDV: tl.constexpr,
    BM: tl.constexpr,
):
    batch = (tl.program_id(0) // HQ).to(tl.int64)
    head = (tl.program_id(0) % HQ).to(tl.int64)
    t = (tl.program_id(1) * BM + tl.arange(0, BM)).to(tl.int64)
    column = tl.arange(0, BDV)
    inside = (t < T)[:, None] & (column < DV)[None, :]
    output = OUTPUT + batch * o_batch + head * o_head + t[:, None] * o_row + column[None, :]
    gradient = GRADIENT + batch * g_batch + head * g_head + t[:, None] * g_row + column[None, :]
    product = tl.load(output, mask=inside, other=0.0).to(tl.float32)
    product *= tl.load(gradient, mask=inside, other=0.0).to(tl.float32)
    tl.store(DELTA + (batch * HQ + head) * lse_stride + t, tl.sum(product, 1), mask=t < T)


@triton.jit
def _key_step(
    d_key,
    d_value,
    d_rate,
    key,
    value,
    rate,
    last,
    queries,
    gradients,
    lses,
    deltas,
    batch,
    query_head,
    n,
    m,
    qk_scale,
    softcap,
    HQ: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BD: tl.constexpr,
    BDV: tl.constexpr,
    MASKED: tl.constexpr,
    LIMITED: tl.constexpr,
    SOFTCAP: tl.constexpr,
    GAUSSIAN: tl.constexpr,
    NEEDS_KV: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Adds what queries m..m+BM give to keys n..n+BN. Matrices are [keys, queries]."""
    query = load_rows(queries, batch, query_head, m, BM, BD)
    # Rows beyond T are all 0, their lse too: weights of 1, but nothing to weigh.
    lse = load_vector(lses, batch * HQ + query_head, m, BM)
    delta = load_vector(deltas, batch * HQ + query_head, m, BM)
    # age = base + low + high; `high` is known when the kernel is compiled, and so costs no registers
    base = (m - n - tl.arange(0, BN)).to(tl.float32)
    low = (tl.arange(0, BM) & 7).to(tl.float32)
    high = (tl.arange(0, BM) & -8).to(tl.float32)
    row = (high + low)[None, :]
    if MASKED:
        # products only, so that it is 0 at age 0 (see `decay`)
        age = row + base[:, None]
        bias = (age * age if GAUSSIAN else age) * rate[:, None] - lse[None, :]
    elif GAUSSIAN:
        bias = (
            row * (row * rate[:, None] + (2.0 * base * rate)[:, None]) + (base * base * rate)[:, None] - lse[None, :]
        )
    else:
        bias = high[None, :] * rate[:, None] + (low[None, :] + base[:, None]) * rate[:, None] - lse[None, :]
    if SOFTCAP:
        held = capped(tl.dot(key, tl.trans(query), input_precision=PRECISION), softcap)
        weights = tl.math.exp2((held + bias) * qk_scale)  # [BN, BM]
    else:
        weights = tl.math.exp2(tl.dot(key, tl.trans(query), bias, input_precision=PRECISION) * qk_scale)
    if MASKED:
        t = m + tl.arange(0, BM)
        i = n + tl.arange(0, BN)
        seen = t[None, :] >= i[:, None]
        if LIMITED:
            seen = seen & (t[None, :] <= last[:, None])
        weights = tl.where(seen, weights, 0.0)
    gradient = load_rows(gradients, batch, query_head, m, BM, BDV)
    if NEEDS_KV:
        d_value = tl.dot(weights.to(gradient.dtype), gradient, d_value, input_precision=PRECISION)
    below = tl.zeros((BN, BM), tl.float32) - delta[None, :]
    d_logits = weights * tl.dot(value, tl.trans(gradient), below, input_precision=PRECISION)
    # Summed over the columns that one thread holds; the four threads of a row add up at the end.
    plain = tl.sum(tl.sum(tl.reshape(d_logits, (BN, BM // 8, 4, 2)), 3), 1)  # [BN, 4]
    risen = tl.sum(tl.sum(tl.reshape(d_logits * row, (BN, BM // 8, 4, 2)), 3), 1)
    if GAUSSIAN:
        curved = tl.sum(tl.sum(tl.reshape(d_logits * (row * row), (BN, BM // 8, 4, 2)), 3), 1)
        d_rate += curved + base[:, None] * (2.0 * risen + base[:, None] * plain)
    else:
        d_rate += risen + base[:, None] * plain
    if NEEDS_KV:
        if SOFTCAP:
            ratio = held / softcap
            d_logits = d_logits * (1.0 - ratio * ratio)  # tanh' = 1 - tanh^2
        d_key = tl.dot(d_logits.to(query.dtype), query, d_key, input_precision=PRECISION)
    return d_key, d_value, d_rate


@triton.jit
def attention_backward_keys(
    queries,
    keys,
    values,
    gradients,
    d_keys,
    d_values,
    D_RATE,  # [B, H, T], gradient of scale * rate
    rates,  # [B * H, T], as in the forward pass
    lses,  # [B * HQ, T]
    deltas,  # [B * HQ, T]
    LAST,  # [B, H, T]
    LISTS,  # int16 [B * H, key blocks, width]: blocks of queries for which the keys are not negligible
    COUNTS,  # [B * H, key blocks]
    T,
    width,
    scale,
    qk_scale,
    softcap,
    HQ: tl.constexpr,
    G: tl.constexpr,
    BD: tl.constexpr,
    BDV: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    STAGES: tl.constexpr,
    LIMITED: tl.constexpr,
    SKIPPING: tl.constexpr,
    SOFTCAP: tl.constexpr,
    GAUSSIAN: tl.constexpr,
    NEEDS_KV: tl.constexpr,
    PRECISION: tl.constexpr,
):
    n = tl.program_id(1) * BN  # the keys that most queries see first
    H: tl.constexpr = HQ // G
    batch = tl.program_id(0) // H
    head = tl.program_id(0) % H
    row = tl.program_id(0).to(tl.int64) * T
    i = n + tl.arange(0, BN)
    key = load_rows(keys, batch, head, n, BN, BD)
    value = load_rows(values, batch, head, n, BN, BDV)
    rate = load_vector(rates, tl.program_id(0), n, BN)
    d_key = tl.zeros((BN, BD), tl.float32)
    d_value = tl.zeros((BN, BDV), tl.float32)
    d_rate = tl.zeros((BN, 4), tl.float32)

    last = i
    end = T  # of the blocks of queries that see any of the keys
    inner = T  # of those that see all of them
    if LIMITED:
        last = tl.load(LAST + row + i, mask=i < T, other=-1)
        end = tl.max(last, 0) + 1
        inner = (tl.min(last, 0) + 1) // BM * BM
    inner = tl.maximum(inner, n + BN)
    for g in range(G):
        query_head = head * G + g
        for m in tl.range(n, tl.minimum(n + BN, end), BM, num_stages=STAGES):
            d_key, d_value, d_rate = _key_step(
                d_key, d_value, d_rate, key, value, rate, last, queries, gradients, lses,
                deltas, batch, query_head, n, m, qk_scale, softcap, HQ, BM, BN, BD, BDV, True, LIMITED, SOFTCAP,
                GAUSSIAN, NEEDS_KV, PRECISION,
            )  # fmt: skip
        if SKIPPING:
            place = tl.program_id(0).to(tl.int64) * tl.num_programs(1) + tl.program_id(1)
            for k in tl.range(0, tl.load(COUNTS + place), num_stages=STAGES):
                m = tl.load(LISTS + place * width + k).to(tl.int32) * BM
                d_key, d_value, d_rate = _key_step(
                    d_key, d_value, d_rate, key, value, rate, last, queries, gradients, lses,
                    deltas, batch, query_head, n, m, qk_scale, softcap, HQ, BM, BN, BD, BDV, False, False, SOFTCAP,
                    GAUSSIAN, NEEDS_KV, PRECISION,
                )  # fmt: skip
        else:
            for m in tl.range(n + BN, inner, BM, num_stages=STAGES):
                d_key, d_value, d_rate = _key_step(
                    d_key, d_value, d_rate, key, value, rate, last, queries, gradients, lses,
                    deltas, batch, query_head, n, m, qk_scale, softcap, HQ, BM, BN, BD, BDV, False, False, SOFTCAP,
                    GAUSSIAN, NEEDS_KV, PRECISION,
                )  # fmt: skip
        if LIMITED:
            for m in tl.range(inner, end, BM, num_stages=STAGES):
                d_key, d_value, d_rate = _key_step(
                    d_key, d_value, d_rate, key, value, rate, last, queries, gradients, lses,
                    deltas, batch, query_head, n, m, qk_scale, softcap, HQ, BM, BN, BD, BDV, True, True,
                    SOFTCAP, GAUSSIAN, NEEDS_KV, PRECISION,
                )  # fmt: skip
    tl.store(D_RATE + row + i, tl.sum(d_rate, 1), mask=i < T)
    if NEEDS_KV:
        d_keys.store([batch, head, n, 0], tl.reshape((d_key * scale).to(d_keys.dtype), (1, 1, BN, BD)))
        d_values.store([batch, head, n, 0], tl.reshape(d_value.to(d_values.dtype), (1, 1, BN, BDV)))


@triton.jit
def _query_step(
    d_query,
    query,
    gradient,
    lse,
    delta,
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
    """Adds what keys n..n+BN give to the queries start..start+BM."""
    row = batch * H + head
    bias = decay(load_vector(rates, row, n, BN), start, n, BM, BN, MASKED, GAUSSIAN)
    key = load_rows(keys, batch, head, n, BN, BD)
    # lse comes times qk_scale
    if SOFTCAP:
        held = capped(tl.dot(query, tl.trans(key), input_precision=PRECISION), softcap)
        weights = tl.math.exp2((held + bias) * qk_scale - lse[:, None])  # [BM, BN]
    else:
        logits = tl.dot(query, tl.trans(key), bias, input_precision=PRECISION)
        weights = tl.math.exp2(logits * qk_scale - lse[:, None])
    if MASKED:
        t = start + tl.arange(0, BM)
        i = n + tl.arange(0, BN)
        seen = t[:, None] >= i[None, :]
        if SPANS:
            seen = seen & (i[None, :] >= first[:, None])
        if EVICTED:
            until = tl.load(UNTIL + row.to(tl.int64) * T + i, mask=i < T, other=0)
            seen = seen & (t[:, None] < until[None, :])
        weights = tl.where(seen, weights, 0.0)
    value = load_rows(values, batch, head, n, BN, BDV)
    d_logits = weights * (tl.dot(gradient, tl.trans(value), input_precision=PRECISION) - delta[:, None])
    if SOFTCAP:
        ratio = held / softcap
        d_logits = d_logits * (1.0 - ratio * ratio)
    return tl.dot(d_logits.to(key.dtype), key, d_query, input_precision=PRECISION)


@triton.jit
def attention_backward_queries(
    queries,
    keys,
    values,
    gradients,
    d_queries,
    rates,
    lses,
    deltas,
    FIRST,  # [B, T]
    UNTIL,  # [B, H, T]
    LISTS,  # as in the forward pass
    COUNTS,
    T,
    width,
    scale,
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
    gradient = load_rows(gradients, batch, query_head, start, BM, BDV)
    lse = load_vector(lses, tl.program_id(0), start, BM) * qk_scale
    delta = load_vector(deltas, tl.program_id(0), start, BM)
    d_query = tl.zeros((BM, BD), tl.float32)

    first = t
    begin = 0
    inner = 0
    if SPANS:
        first = tl.load(FIRST + batch.to(tl.int64) * T + t, mask=t < T, other=T)
        begin = tl.min(first, 0) // BN * BN
        inner = tl.cdiv(tl.max(first, 0), BN) * BN
    if EVICTED:
        inner = start
    inner = tl.minimum(inner, start)
    if EVICTED:
        for n in tl.range(begin, inner, BN):
            held = tl.max(tl.load(UNTIL + (batch * H + head).to(tl.int64) * T + n + tl.arange(0, BN)), 0) > start
            if held:
                d_query = _query_step(
                    d_query, query, gradient, lse, delta, keys, values, rates, UNTIL, batch, head, start, first, n,
                    T, qk_scale, softcap, H, BM, BN, BD, BDV, True, SPANS, True, SOFTCAP, GAUSSIAN, PRECISION,
                )  # fmt: skip
    elif SPANS:
        for n in tl.range(begin, inner, BN, num_stages=STAGES):
            d_query = _query_step(
                d_query, query, gradient, lse, delta, keys, values, rates, UNTIL, batch, head, start, first, n, T,
                qk_scale, softcap, H, BM, BN, BD, BDV, True, True, False, SOFTCAP, GAUSSIAN, PRECISION,
            )  # fmt: skip
    if SKIPPING:
        place = (batch * H + head) * tl.num_programs(1) + block
        LISTS += place.to(tl.int64) * width
        for k in tl.range(0, tl.load(COUNTS + place), num_stages=STAGES):
            n = tl.load(LISTS + k).to(tl.int32) * BN
            d_query = _query_step(
                d_query, query, gradient, lse, delta, keys, values, rates, UNTIL, batch, head, start, first, n, T,
                qk_scale, softcap, H, BM, BN, BD, BDV, False, False, False, SOFTCAP, GAUSSIAN, PRECISION,
            )  # fmt: skip
    else:
        for n in tl.range(inner, start, BN, num_stages=STAGES):
            d_query = _query_step(
                d_query, query, gradient, lse, delta, keys, values, rates, UNTIL, batch, head, start, first, n, T,
                qk_scale, softcap, H, BM, BN, BD, BDV, False, False, False, SOFTCAP, GAUSSIAN, PRECISION,
            )  # fmt: skip
    for n in tl.range(start, tl.minimum(start + BM, T), BN, num_stages=STAGES):
        d_query = _query_step(
            d_query, query, gradient, lse, delta, keys, values, rates, UNTIL, batch, head, start, first, n, T,
            qk_scale, softcap, H, BM, BN, BD, BDV, True, SPANS, EVICTED, SOFTCAP, GAUSSIAN, PRECISION,
        )  # fmt: skip
    d_queries.store([batch, query_head, start, 0], tl.reshape((d_query * scale).to(d_queries.dtype), (1, 1, BM, BD)))
