"""The backward kernels for Hopper GPUs: two groups of four warps, the first of which also copies.

The same arithmetic as backward.py. Each group keeps two matrix products under way while its threads do what lies between.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma, warpgroup_mma, warpgroup_mma_wait

from retention_gates.kernels.retention_attention.hopper import (
    claim,
    copy_out,
    fence,
    in_flight,
    load_pair,
    release,
    span,
)


@gluon.jit
def _by_thread(matrix, BN: gl.constexpr, BM: gl.constexpr):
    """Sums [BN, 4] over the columns that one thread holds, so that nothing is exchanged between threads."""
    return gl.sum(gl.sum(gl.reshape(matrix, (BN, BM // 8, 4, 2)), 3), 1)


@gluon.jit
def _query_blocks(LAST, row, n, T, BM: gl.constexpr, BN: gl.constexpr, LIMITED: gl.constexpr, layout: gl.constexpr):
    """Last query that sees each of keys n..n+BN; and up to which query any of them is seen, and all of them."""
    i = n + gl.arange(0, BN, layout=layout)
    last = i
    end = T
    inner = T
    if LIMITED:
        last = gl.load(LAST + row * T + i, mask=i < T, other=-1)
        end = gl.minimum(gl.max(last, 0) + 1, T)
        inner = (gl.min(last, 0) + 1) // BM * BM
    return last, end, inner


@gluon.jit
def _key_step(
    d_key, d_value, d_log_beta, key, value, log_beta, last, queries, gradients, query_buffers,
    gradient_buffers, ready, free, LSE, DELTA, batch, query_head, vector, n, start, block, blocks, index, rest, qk_scale,
    PART: gl.constexpr, S: gl.constexpr, O: gl.constexpr, OV: gl.constexpr, BM: gl.constexpr, BN: gl.constexpr, BD: gl.constexpr,
    BDV: gl.constexpr, STAGES: gl.constexpr, MASKED: gl.constexpr, LIMITED: gl.constexpr, NEEDS_KV: gl.constexpr,
):  # fmt: skip
    """Adds what a block of queries gives to keys n..n+BN. Matrices are [keys, queries]."""
    m = start + block * BM
    column = gl.arange(0, BM, layout=gl.SliceLayout(0, S))
    row = gl.arange(0, BN, layout=gl.SliceLayout(1, S))
    slot = index % STAGES
    lse = gl.load(LSE + vector + m + column)
    empty = gl.full([BN, BM], 0.0, gl.float32, layout=S)
    mbarrier.wait(ready.index(slot), (index // STAGES) & 1)
    query = query_buffers.index(slot).reshape([BM, BD])
    gradient = gradient_buffers.index(slot).reshape([BM, BDV])
    logits = warpgroup_mma(key, query.permute((1, 0)), empty, use_acc=False, is_async=True)
    d_weights = warpgroup_mma(value, gradient.permute((1, 0)), empty, use_acc=False, is_async=True)
    logits = warpgroup_mma_wait(1, deps=[logits])
    if PART == 0:
        if (index + 1 >= STAGES) & (rest > 1):
            over = block + 1 == blocks  # the next block is the first of the next head
            claim(free, index + 1, STAGES)
            load_pair(queries, gradients, batch, query_head + gl.where(over, 1, 0),
                      start + gl.where(over, 0, block + 1) * BM, (index + 1) % STAGES, query_buffers, gradient_buffers,
                      ready)  # fmt: skip
    elif index > 0:
        release(free, (index - 1) % STAGES)

    # age = base + low + high; `high` is known when the kernel is compiled, and so costs no registers
    base = (m - n - row).to(gl.float32)
    low = (column & 7).to(gl.float32)
    high = (column & -8).to(gl.float32)
    age = (low[None, :] + base[:, None]) + high[None, :]
    bias = age * (log_beta * qk_scale)[:, None] - (lse * qk_scale)[None, :]
    weights = gl.exp2(logits * qk_scale + bias)
    if MASKED:
        seen = (m + column)[None, :] >= (n + row)[:, None]
        if LIMITED:
            seen = seen & ((m + column)[None, :] <= last[:, None])
        weights = gl.where(seen, weights, 0.0)
    if NEEDS_KV:
        left = gl.convert_layout(weights.to(query.dtype), gl.DotOperandLayout(0, OV, 2))
        d_value = warpgroup_mma(left, gradient, d_value, is_async=True)
        delta = gl.load(DELTA + vector + m + column)
        d_weights = warpgroup_mma_wait(1, deps=[d_weights])
    else:
        delta = gl.load(DELTA + vector + m + column)
        d_weights = warpgroup_mma_wait(0, deps=[d_weights])
    change = weights * (d_weights - delta[None, :])
    plain = _by_thread(change, BN, BM)
    risen = _by_thread(change * (high + low)[None, :], BN, BM)
    d_log_beta += risen + gl.convert_layout(base, gl.SliceLayout(1, plain.type.layout))[:, None] * plain
    if NEEDS_KV:
        d_logits = gl.convert_layout(change.to(query.dtype), gl.DotOperandLayout(0, O, 2))
        d_key = warpgroup_mma(d_logits, query, d_key, is_async=True)
        d_value, left, d_key, d_logits = warpgroup_mma_wait(0, deps=[d_value, left, d_key, d_logits])
    return d_key, d_value, d_log_beta


@gluon.jit
def _compute_keys(
    PART: gl.constexpr, queries, gradients, key_buffers, value_buffers, query_buffers, gradient_buffers, pair_ready,
    ready, free, d_keys, d_values, D_LOG_BETA, LOG_BETA, LSE, DELTA, LAST, T, padded, scale, qk_scale, batch, head, start,
    HQ: gl.constexpr, G: gl.constexpr, BD: gl.constexpr, BDV: gl.constexpr, BM: gl.constexpr, BN: gl.constexpr,
    STAGES: gl.constexpr, LIMITED: gl.constexpr, NEEDS_KV: gl.constexpr,
):  # fmt: skip
    """Half of a block's keys, BN = 64 of them."""
    S: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BM, 16])
    O: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BD, 16])
    OV: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BDV, 16])
    ROWS: gl.constexpr = gl.SliceLayout(1, S)
    n = start + PART * BN
    row = (batch * (HQ // G) + head).to(gl.int64)
    log_beta = gl.load(LOG_BETA + row * padded + n + gl.arange(0, BN, layout=ROWS))
    # both halves walk through the same blocks of queries, so that one copy serves both
    last, _, inner = _query_blocks(LAST, row, n, T, BM, BN, LIMITED, ROWS)
    _, end, _ = _query_blocks(LAST, row, start, T, BM, 2 * BN, LIMITED, ROWS)
    blocks = gl.maximum(gl.cdiv(end - start, BM), 1)
    diagonal = gl.minimum(2 * BN // BM, blocks)
    whole = gl.minimum(gl.maximum((inner - start) // BM, diagonal), blocks)
    if not LIMITED:
        whole = blocks

    d_key = gl.full([BN, BD], 0.0, gl.float32, layout=O)
    d_value = gl.full([BN, BDV], 0.0, gl.float32, layout=OV)
    d_log_beta = _by_thread(gl.full([BN, BM], 0.0, gl.float32, layout=S), BN, BM)
    mbarrier.wait(pair_ready.index(PART), 0)
    key = key_buffers.index(PART).reshape([BN, BD])
    value = value_buffers.index(PART).reshape([BN, BDV])
    index = 0
    for g in range(G):
        vector = (batch * HQ + head * G + g).to(gl.int64) * padded
        for block in range(0, diagonal):
            d_key, d_value, d_log_beta = _key_step(
                d_key, d_value, d_log_beta, key, value, log_beta, last, queries, gradients, query_buffers,
                gradient_buffers, ready, free, LSE, DELTA, batch, head * G + g, vector, n, start, block, blocks, index,
                G * blocks - index, qk_scale, PART, S, O, OV, BM, BN, BD, BDV, STAGES, True, LIMITED, NEEDS_KV,
            )  # fmt: skip
            index += 1
        for block in range(diagonal, whole):
            d_key, d_value, d_log_beta = _key_step(
                d_key, d_value, d_log_beta, key, value, log_beta, last, queries, gradients, query_buffers,
                gradient_buffers, ready, free, LSE, DELTA, batch, head * G + g, vector, n, start, block, blocks, index,
                G * blocks - index, qk_scale, PART, S, O, OV, BM, BN, BD, BDV, STAGES, False, False, NEEDS_KV,
            )  # fmt: skip
            index += 1
        if LIMITED:
            for block in range(whole, blocks):
                d_key, d_value, d_log_beta = _key_step(
                    d_key, d_value, d_log_beta, key, value, log_beta, last, queries, gradients, query_buffers,
                    gradient_buffers, ready, free, LSE, DELTA, batch, head * G + g, vector, n, start, block, blocks,
                    index, G * blocks - index, qk_scale, PART, S, O, OV, BM, BN, BD, BDV, STAGES, True, True, NEEDS_KV,
                )  # fmt: skip
                index += 1

    summed = gl.sum(d_log_beta, 1)
    i = n + gl.arange(0, BN, layout=summed.type.layout)
    gl.store(D_LOG_BETA + row * T + i, summed, mask=i < T)
    if NEEDS_KV:
        # keys and values have been read: their gradients take their place
        key.store((d_key * scale).to(d_keys.dtype))
        value.store(d_value.to(d_values.dtype))
        fence()
        copy_out(d_keys, [batch, head, n, 0], key_buffers.index(PART))
        copy_out(d_values, [batch, head, n, 0], value_buffers.index(PART))
        tma.store_wait(0)


@gluon.jit
def attention_backward_keys(
    queries, keys, values, gradients, d_keys, d_values,
    D_LOG_BETA,  # [B, H, T]
    LOG_BETA,  # [B, H, padded], over scale
    LSE,  # [B, HQ, padded]
    DELTA,  # [B, HQ, padded]
    LAST,  # [B, H, T]
    T, padded, scale, qk_scale,
    HQ: gl.constexpr, G: gl.constexpr, BD: gl.constexpr, BDV: gl.constexpr, BM: gl.constexpr, BN: gl.constexpr,
    STAGES: gl.constexpr, LIMITED: gl.constexpr, NEEDS_KV: gl.constexpr,
):  # fmt: skip
    H: gl.constexpr = HQ // G
    LINE: gl.constexpr = gl.BlockedLayout([1], [32], [4], [0])
    start = gl.program_id(1) * (2 * BN)
    batch = gl.program_id(0) // H
    head = gl.program_id(0) % H
    key_buffers = gl.allocate_shared_memory(keys.dtype, [2, 1, 1, BN, BD], keys.layout)
    value_buffers = gl.allocate_shared_memory(values.dtype, [2, 1, 1, BN, BDV], values.layout)
    query_buffers = gl.allocate_shared_memory(queries.dtype, [STAGES, 1, 1, BM, BD], queries.layout)
    gradient_buffers = gl.allocate_shared_memory(gradients.dtype, [STAGES, 1, 1, BM, BDV], gradients.layout)
    pair_ready = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for part in gl.static_range(2):
        mbarrier.init(pair_ready.index(part), count=1)
    for slot in gl.static_range(STAGES):
        mbarrier.init(ready.index(slot), count=1)
        mbarrier.init(free.index(slot), count=1)
    fence()
    _, end, _ = _query_blocks(LAST, (batch * H + head).to(gl.int64), start, T, BM, 2 * BN, LIMITED, LINE)
    blocks = gl.maximum(gl.cdiv(end - start, BM), 1)
    for part in gl.static_range(2):
        load_pair(keys, values, batch, head, start + part * BN, part, key_buffers, value_buffers, pair_ready)
    for slot in gl.static_range(STAGES):
        if slot < G * blocks:
            g = slot // blocks
            load_pair(queries, gradients, batch, head * G + g, start + (slot - g * blocks) * BM, slot, query_buffers,
                      gradient_buffers, ready)  # fmt: skip
    gl.warp_specialize(
        [
            (_compute_keys, (0, queries, gradients, key_buffers, value_buffers, query_buffers, gradient_buffers,
             pair_ready, ready, free, d_keys, d_values, D_LOG_BETA, LOG_BETA, LSE, DELTA, LAST, T, padded, scale,
             qk_scale, batch, head, start, HQ, G, BD, BDV, BM, BN, STAGES, LIMITED, NEEDS_KV)),
            (_compute_keys, (1, queries, gradients, key_buffers, value_buffers, query_buffers, gradient_buffers,
             pair_ready, ready, free, d_keys, d_values, D_LOG_BETA, LOG_BETA, LSE, DELTA, LAST, T, padded, scale,
             qk_scale, batch, head, start, HQ, G, BD, BDV, BM, BN, STAGES, LIMITED, NEEDS_KV)),
        ],
        [4],
        [240],
    )  # fmt: skip


@gluon.jit
def _query_step(
    d_query, d_logits, query, gradient, lse, delta, keys, values, key_buffers, value_buffers, ready, free, LOG_BETA,
    first, batch, head, start, top, index, blocks, qk_scale,
    PART: gl.constexpr, S: gl.constexpr, O: gl.constexpr, BM: gl.constexpr, BN: gl.constexpr, BD: gl.constexpr, BDV: gl.constexpr,
    STAGES: gl.constexpr, MASKED: gl.constexpr, SPANS: gl.constexpr,
):  # fmt: skip
    """Adds what block `index` of the keys, counted from the diagonal down, gives to the queries start..start+BM."""
    n = top - index * BN
    slot = index % STAGES
    column = gl.arange(0, BN, layout=gl.SliceLayout(0, S))
    row = gl.arange(0, BM, layout=gl.SliceLayout(1, S))
    log_beta = gl.load(LOG_BETA + n + column)
    empty = gl.full([BM, BN], 0.0, gl.float32, layout=S)
    mbarrier.wait(ready.index(slot), (index // STAGES) & 1)
    key = key_buffers.index(slot).reshape([BN, BD])
    value = value_buffers.index(slot).reshape([BN, BDV])
    logits = warpgroup_mma(query, key.permute((1, 0)), empty, use_acc=False, is_async=True)
    d_weights = warpgroup_mma(gradient, value.permute((1, 0)), empty, use_acc=False, is_async=True)
    logits, d_query, d_logits = warpgroup_mma_wait(1, deps=[logits, d_query, d_logits])
    if PART == 0:
        if (index + 1 >= STAGES) & (index + 1 < blocks):
            claim(free, index + 1, STAGES)
            load_pair(keys, values, batch, head, n - BN, (index + 1) % STAGES, key_buffers, value_buffers, ready)
    elif index > 0:
        release(free, (index - 1) % STAGES)

    base = ((start - n) - (column & 7)).to(gl.float32) - (column & -8).to(gl.float32)
    decayed = row.to(gl.float32)[:, None] * log_beta[None, :] + (logits + (base * log_beta)[None, :])
    weights = gl.exp2(decayed * qk_scale - lse[:, None])
    if MASKED:
        seen = (start + row)[:, None] >= (n + column)[None, :]
        if SPANS:
            seen = seen & ((n + column)[None, :] >= first[:, None])
        weights = gl.where(seen, weights, 0.0)
    d_weights = warpgroup_mma_wait(0, deps=[d_weights])
    change = weights * (d_weights - delta[:, None])
    d_logits = gl.convert_layout(change.to(key.dtype), gl.DotOperandLayout(0, O, 2))
    d_query = warpgroup_mma(d_logits, key, d_query, is_async=True)
    return d_query, d_logits


@gluon.jit
def _compute_queries(
    PART: gl.constexpr, keys, values, query_buffers, gradient_buffers, key_buffers, value_buffers, pair_ready, ready,
    free, d_queries, LOG_BETA, LSE, DELTA, FIRST, T, padded, scale, qk_scale, batch, query_head, head, block,
    HQ: gl.constexpr, G: gl.constexpr, BD: gl.constexpr, BDV: gl.constexpr, BM: gl.constexpr, BN: gl.constexpr,
    STAGES: gl.constexpr, SPANS: gl.constexpr,
):  # fmt: skip
    """Half of a block's queries, BM = 64 of them."""
    S: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BN, 16])
    O: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BD, 16])
    ROWS: gl.constexpr = gl.SliceLayout(1, S)
    start = block * (2 * BM) + PART * BM
    LOG_BETA += (batch * (HQ // G) + head).to(gl.int64) * padded
    vector = (batch * HQ + query_head).to(gl.int64) * padded + start + gl.arange(0, BM, layout=ROWS)
    lse = gl.load(LSE + vector) * qk_scale
    delta = gl.load(DELTA + vector)
    _, begin, _ = span(FIRST, batch, block * (2 * BM), T, 2 * BM, BN, SPANS, ROWS)
    first, _, inner = span(FIRST, batch, start, T, BM, BN, SPANS, ROWS)
    top = block * (2 * BM) + 2 * BM - BN
    blocks = (top - begin) // BN + 1
    diagonal = gl.minimum(2 * BM // BN, blocks)
    whole = gl.maximum(gl.minimum((top - inner) // BN + 1, blocks), diagonal)

    d_query = in_flight(gl.full([BM, BD], 0.0, gl.float32, layout=O))
    d_logits = gl.full([BM, BN], 0.0, d_queries.dtype, layout=gl.DotOperandLayout(0, O, 2))
    mbarrier.wait(pair_ready.index(PART), 0)
    query = query_buffers.index(PART).reshape([BM, BD])
    gradient = gradient_buffers.index(PART).reshape([BM, BDV])
    for index in range(0, diagonal):
        d_query, d_logits = _query_step(
            d_query, d_logits, query, gradient, lse, delta, keys, values, key_buffers, value_buffers, ready, free,
            LOG_BETA, first, batch, head, start, top, index, blocks, qk_scale, PART, S, O, BM, BN, BD, BDV, STAGES, True, SPANS,
        )  # fmt: skip
    for index in range(diagonal, whole):
        d_query, d_logits = _query_step(
            d_query, d_logits, query, gradient, lse, delta, keys, values, key_buffers, value_buffers, ready, free,
            LOG_BETA, first, batch, head, start, top, index, blocks, qk_scale, PART, S, O, BM, BN, BD, BDV, STAGES, False, False,
        )  # fmt: skip
    if SPANS:
        for index in range(whole, blocks):
            d_query, d_logits = _query_step(
                d_query, d_logits, query, gradient, lse, delta, keys, values, key_buffers, value_buffers, ready, free,
                LOG_BETA, first, batch, head, start, top, index, blocks, qk_scale, PART, S, O, BM, BN, BD, BDV, STAGES, True, True,
            )  # fmt: skip

    d_query, d_logits = warpgroup_mma_wait(0, deps=[d_query, d_logits])
    query.store((d_query * scale).to(d_queries.dtype))
    fence()
    copy_out(d_queries, [batch, query_head, start, 0], query_buffers.index(PART))
    tma.store_wait(0)


@gluon.jit
def attention_backward_queries(
    queries, keys, values, gradients, d_queries,
    LOG_BETA, LSE, DELTA,
    FIRST,  # [B, T]
    T, padded, scale, qk_scale,
    HQ: gl.constexpr, G: gl.constexpr, BD: gl.constexpr, BDV: gl.constexpr, BM: gl.constexpr, BN: gl.constexpr,
    STAGES: gl.constexpr, SPANS: gl.constexpr,
):  # fmt: skip
    LINE: gl.constexpr = gl.BlockedLayout([1], [32], [4], [0])
    block = gl.num_programs(1) - 1 - gl.program_id(1)
    batch = gl.program_id(0) // HQ
    query_head = gl.program_id(0) % HQ
    head = query_head // G
    query_buffers = gl.allocate_shared_memory(queries.dtype, [2, 1, 1, BM, BD], queries.layout)
    gradient_buffers = gl.allocate_shared_memory(gradients.dtype, [2, 1, 1, BM, BDV], gradients.layout)
    key_buffers = gl.allocate_shared_memory(keys.dtype, [STAGES, 1, 1, BN, BD], keys.layout)
    value_buffers = gl.allocate_shared_memory(values.dtype, [STAGES, 1, 1, BN, BDV], values.layout)
    pair_ready = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for part in gl.static_range(2):
        mbarrier.init(pair_ready.index(part), count=1)
    for slot in gl.static_range(STAGES):
        mbarrier.init(ready.index(slot), count=1)
        mbarrier.init(free.index(slot), count=1)
    fence()
    start = block * (2 * BM)
    _, begin, _ = span(FIRST, batch, start, T, 2 * BM, BN, SPANS, LINE)
    top = start + 2 * BM - BN
    for part in gl.static_range(2):
        load_pair(queries, gradients, batch, query_head, start + part * BM, part, query_buffers, gradient_buffers,
                  pair_ready)  # fmt: skip
    for slot in gl.static_range(STAGES):
        if top - slot * BN >= begin:
            load_pair(keys, values, batch, head, top - slot * BN, slot, key_buffers, value_buffers, ready)
    gl.warp_specialize(
        [
            (_compute_queries, (0, keys, values, query_buffers, gradient_buffers, key_buffers, value_buffers,
             pair_ready, ready, free, d_queries, LOG_BETA, LSE, DELTA, FIRST, T, padded, scale, qk_scale, batch,
             query_head, head, block, HQ, G, BD, BDV, BM, BN, STAGES, SPANS)),
            (_compute_queries, (1, keys, values, query_buffers, gradient_buffers, key_buffers, value_buffers,
             pair_ready, ready, free, d_queries, LOG_BETA, LSE, DELTA, FIRST, T, padded, scale, qk_scale, batch,
             query_head, head, block, HQ, G, BD, BDV, BM, BN, STAGES, SPANS)),
        ],
        [4],
        [240],
    )  # fmt: skip
