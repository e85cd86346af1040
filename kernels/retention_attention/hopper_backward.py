"""The backward kernels for Hopper GPUs: two matrix products are under way while their threads do what lies between.

The same arithmetic as backward.py, in Gluon (see hopper_forward.py).
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma, warpgroup_mma, warpgroup_mma_wait

from retention_gates.kernels.retention_attention.hopper import copy_out, fence, in_flight, load, synchronize


@gluon.jit
def _by_thread(matrix, BN: gl.constexpr, BM: gl.constexpr):
    """Sums [BN, 4] over the columns that one thread holds, so that nothing is exchanged between threads."""
    return gl.sum(gl.sum(gl.reshape(matrix, (BN, BM // 8, 4, 2)), 3), 1)


@gluon.jit
def _key_step(
    d_key, d_value, d_log_beta, d_logits, key, value, log_beta, last, queries, gradients, query_buffers,
    gradient_buffers, query_ready, gradient_ready, LSE, DELTA, batch, head, n, m, index, next_m, next_g, more, padded,
    qk_scale, HQ: gl.constexpr, G: gl.constexpr, S: gl.constexpr, O: gl.constexpr, OV: gl.constexpr, BM: gl.constexpr, BN: gl.constexpr,
    BD: gl.constexpr, BDV: gl.constexpr, MASKED: gl.constexpr, LIMITED: gl.constexpr, NEEDS_KV: gl.constexpr, g,
):  # fmt: skip
    """Adds what queries m..m+BM of head g give to keys n..n+BN. Matrices are [keys, queries]."""
    COLUMNS: gl.constexpr = gl.SliceLayout(0, S)
    column = gl.arange(0, BM, layout=COLUMNS)
    row = gl.arange(0, BN, layout=gl.SliceLayout(1, S))
    slot = index & 1
    vector = (batch * HQ + head * G + g).to(gl.int64) * padded + m
    lse = gl.load(LSE + vector + column) * qk_scale
    empty = gl.full([BN, BM], 0.0, gl.float32, layout=S)
    mbarrier.wait(query_ready.index(slot), (index >> 1) & 1)
    query = query_buffers.index(slot).reshape([BM, BD])
    logits = warpgroup_mma(key, query.permute((1, 0)), empty, use_acc=False, is_async=True)
    mbarrier.wait(gradient_ready.index(slot), (index >> 1) & 1)
    gradient = gradient_buffers.index(slot).reshape([BM, BDV])
    d_weights = warpgroup_mma(value, gradient.permute((1, 0)), empty, use_acc=False, is_async=True)
    if NEEDS_KV:
        logits, d_key, d_logits = warpgroup_mma_wait(1, deps=[logits, d_key, d_logits])
    else:
        logits = warpgroup_mma_wait(1, deps=[logits])
    synchronize()  # nobody reads what the step before read any more
    if more:
        load(queries, batch, head * G + next_g, next_m, (index + 1) & 1, query_buffers, query_ready)
        load(gradients, batch, head * G + next_g, next_m, (index + 1) & 1, gradient_buffers, gradient_ready)

    # age = base + low + high; `high` is known when the kernel is compiled, and so costs no registers
    base = (m - n - row).to(gl.float32)
    low = (column & 7).to(gl.float32)
    high = (column & -8).to(gl.float32)
    age = (low[None, :] + base[:, None]) + high[None, :]
    weights = gl.exp2(logits * qk_scale + (age * (log_beta * qk_scale)[:, None] - lse[None, :]))
    if MASKED:
        seen = (m + column)[None, :] >= (n + row)[:, None]
        if LIMITED:
            seen = seen & ((m + column)[None, :] <= last[:, None])
        weights = gl.where(seen, weights, 0.0)
    if NEEDS_KV:
        left = gl.convert_layout(weights.to(gradients.dtype), gl.DotOperandLayout(0, OV, 2))
        d_value = warpgroup_mma(left, gradient, d_value, is_async=True)
        d_weights = warpgroup_mma_wait(1, deps=[d_weights])
    else:
        d_weights = warpgroup_mma_wait(0, deps=[d_weights])
    delta = gl.load(DELTA + vector + column)
    change = weights * (d_weights - delta[None, :])
    plain = _by_thread(change, BN, BM)
    risen = _by_thread(change * (high + low)[None, :], BN, BM)
    d_log_beta += risen + gl.convert_layout(base, gl.SliceLayout(1, plain.type.layout))[:, None] * plain
    if NEEDS_KV:
        d_logits = gl.convert_layout(change.to(queries.dtype), gl.DotOperandLayout(0, O, 2))
        d_value, left = warpgroup_mma_wait(0, deps=[d_value, left])
        d_key = warpgroup_mma(d_logits, query, d_key, is_async=True)
    return d_key, d_value, d_log_beta, d_logits


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
    LIMITED: gl.constexpr, NEEDS_KV: gl.constexpr,
):  # fmt: skip
    S: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [gl.num_warps(), 1], [16, BM, 16])
    O: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [gl.num_warps(), 1], [16, BD, 16])
    OV: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [gl.num_warps(), 1], [16, BDV, 16])
    H: gl.constexpr = HQ // G
    n = gl.program_id(1) * BN
    batch = gl.program_id(0) // H
    head = gl.program_id(0) % H
    i = n + gl.arange(0, BN, layout=gl.SliceLayout(1, S))
    log_beta = gl.load(LOG_BETA + gl.program_id(0).to(gl.int64) * padded + i)

    key_buffer = gl.allocate_shared_memory(keys.dtype, [1, 1, 1, BN, BD], keys.layout)
    value_buffer = gl.allocate_shared_memory(values.dtype, [1, 1, 1, BN, BDV], values.layout)
    query_buffers = gl.allocate_shared_memory(queries.dtype, [2, 1, 1, BM, BD], queries.layout)
    gradient_buffers = gl.allocate_shared_memory(gradients.dtype, [2, 1, 1, BM, BDV], gradients.layout)
    key_ready = gl.allocate_shared_memory(gl.int64, [1, 1], mbarrier.MBarrierLayout())
    value_ready = gl.allocate_shared_memory(gl.int64, [1, 1], mbarrier.MBarrierLayout())
    query_ready = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    gradient_ready = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    mbarrier.init(key_ready.index(0), count=1)
    mbarrier.init(value_ready.index(0), count=1)
    for slot in gl.static_range(2):
        mbarrier.init(query_ready.index(slot), count=1)
        mbarrier.init(gradient_ready.index(slot), count=1)
    synchronize()

    last = i
    end = T
    inner = T
    if LIMITED:
        last = gl.load(LAST + gl.program_id(0).to(gl.int64) * T + i, mask=i < T, other=-1)
        end = gl.max(last, 0) + 1
        inner = (gl.min(last, 0) + 1) // BM * BM
    # blocks of queries: on the diagonal, below it, and where documents or windows end; never none
    blocks = gl.maximum(gl.cdiv(gl.minimum(end, T) - n, BM), 1)
    diagonal = gl.minimum(BN // BM, blocks)
    whole = gl.minimum(gl.maximum(gl.cdiv(inner - n, BM), diagonal), blocks)

    load(keys, batch, head, n, 0, key_buffer, key_ready)
    load(values, batch, head, n, 0, value_buffer, value_ready)
    load(queries, batch, head * G, n, 0, query_buffers, query_ready)
    load(gradients, batch, head * G, n, 0, gradient_buffers, gradient_ready)
    d_key = in_flight(gl.full([BN, BD], 0.0, gl.float32, layout=O))
    d_value = gl.full([BN, BDV], 0.0, gl.float32, layout=OV)
    d_logits = gl.full([BN, BM], 0.0, queries.dtype, layout=gl.DotOperandLayout(0, O, 2))
    d_log_beta = _by_thread(gl.full([BN, BM], 0.0, gl.float32, layout=S), BN, BM)
    mbarrier.wait(key_ready.index(0), 0)
    mbarrier.wait(value_ready.index(0), 0)
    key = key_buffer.index(0).reshape([BN, BD])
    value = value_buffer.index(0).reshape([BN, BDV])

    index = 0
    for g in range(G):
        for block in range(0, diagonal):
            final = block + 1 == blocks
            d_key, d_value, d_log_beta, d_logits = _key_step(
                d_key, d_value, d_log_beta, d_logits, key, value, log_beta, last, queries, gradients, query_buffers,
                gradient_buffers, query_ready, gradient_ready, LSE, DELTA, batch, head, n, n + block * BM, index,
                n + gl.where(final, 0, block + 1) * BM, gl.where(final, g + 1, g), (not final) | (g + 1 < G), padded, qk_scale, HQ, G, S, O, OV, BM, BN, BD, BDV, True, LIMITED, NEEDS_KV, g,
            )  # fmt: skip
            index += 1
        for block in range(diagonal, whole):
            final = block + 1 == blocks
            d_key, d_value, d_log_beta, d_logits = _key_step(
                d_key, d_value, d_log_beta, d_logits, key, value, log_beta, last, queries, gradients, query_buffers,
                gradient_buffers, query_ready, gradient_ready, LSE, DELTA, batch, head, n, n + block * BM, index,
                n + gl.where(final, 0, block + 1) * BM, gl.where(final, g + 1, g), (not final) | (g + 1 < G), padded, qk_scale, HQ, G, S, O, OV, BM, BN, BD, BDV, False, False, NEEDS_KV, g,
            )  # fmt: skip
            index += 1
        if LIMITED:
            for block in range(whole, blocks):
                final = block + 1 == blocks
                d_key, d_value, d_log_beta, d_logits = _key_step(
                    d_key, d_value, d_log_beta, d_logits, key, value, log_beta, last, queries, gradients,
                    query_buffers, gradient_buffers, query_ready, gradient_ready, LSE, DELTA, batch, head, n,
                    n + block * BM, index, n + gl.where(final, 0, block + 1) * BM, gl.where(final, g + 1, g), (not final) | (g + 1 < G), padded, qk_scale, HQ, G, S, O, OV, BM, BN, BD, BDV, True, True, NEEDS_KV, g,
                )  # fmt: skip
                index += 1

    summed = gl.sum(d_log_beta, 1)
    where = n + gl.arange(0, BN, layout=summed.type.layout)
    gl.store(D_LOG_BETA + gl.program_id(0).to(gl.int64) * T + where, summed, mask=where < T)
    if NEEDS_KV:
        d_key, d_logits = warpgroup_mma_wait(0, deps=[d_key, d_logits])
        synchronize()
        key.store((d_key * scale).to(d_keys.dtype))
        value.store(d_value.to(d_values.dtype))
        fence()
        synchronize()
        copy_out(d_keys, [batch, head, n, 0], key_buffer.index(0))
        copy_out(d_values, [batch, head, n, 0], value_buffer.index(0))
        tma.store_wait(0)


@gluon.jit
def _query_step(
    d_query, d_logits, query, gradient, lse, delta, keys, values, key_buffers, value_buffers, key_ready, value_ready,
    LOG_BETA, first, batch, head, start, top, index, blocks, qk_scale,
    S: gl.constexpr, O: gl.constexpr, BM: gl.constexpr, BN: gl.constexpr, BD: gl.constexpr, BDV: gl.constexpr,
    MASKED: gl.constexpr, SPANS: gl.constexpr,
):  # fmt: skip
    """Adds what block `index` of the keys, counted from the diagonal down, gives to the queries start..start+BM."""
    n = top - index * BN
    slot = index & 1
    column = gl.arange(0, BN, layout=gl.SliceLayout(0, S))
    row = gl.arange(0, BM, layout=gl.SliceLayout(1, S))
    log_beta = gl.load(LOG_BETA + n + column)
    empty = gl.full([BM, BN], 0.0, gl.float32, layout=S)
    mbarrier.wait(key_ready.index(slot), (index >> 1) & 1)
    key = key_buffers.index(slot).reshape([BN, BD])
    logits = warpgroup_mma(query, key.permute((1, 0)), empty, use_acc=False, is_async=True)
    mbarrier.wait(value_ready.index(slot), (index >> 1) & 1)
    value = value_buffers.index(slot).reshape([BN, BDV])
    d_weights = warpgroup_mma(gradient, value.permute((1, 0)), empty, use_acc=False, is_async=True)
    logits, d_query, d_logits = warpgroup_mma_wait(1, deps=[logits, d_query, d_logits])
    synchronize()  # nobody reads what the step before read any more
    if (index > 0) & (index + 1 < blocks):
        load(keys, batch, head, n - BN, (index + 1) & 1, key_buffers, key_ready)
        load(values, batch, head, n - BN, (index + 1) & 1, value_buffers, value_ready)

    base = ((start - n) - (column & 7)).to(gl.float32) - (column & -8).to(gl.float32)
    decay = row.to(gl.float32)[:, None] * log_beta[None, :] + (logits + (base * log_beta)[None, :])
    weights = gl.exp2(decay * qk_scale - lse[:, None])
    if MASKED:
        seen = (start + row)[:, None] >= (n + column)[None, :]
        if SPANS:
            seen = seen & ((n + column)[None, :] >= first[:, None])
        weights = gl.where(seen, weights, 0.0)
    d_weights = warpgroup_mma_wait(0, deps=[d_weights])
    change = weights * (d_weights - delta[:, None])
    d_logits = gl.convert_layout(change.to(keys.dtype), gl.DotOperandLayout(0, O, 2))
    d_query = warpgroup_mma(d_logits, key, d_query, is_async=True)
    return d_query, d_logits


@gluon.jit
def attention_backward_queries(
    queries, keys, values, gradients, d_queries,
    LOG_BETA, LSE, DELTA,
    FIRST,  # [B, T]
    T, padded, scale, qk_scale,
    HQ: gl.constexpr, G: gl.constexpr, BD: gl.constexpr, BDV: gl.constexpr, BM: gl.constexpr, BN: gl.constexpr,
    SPANS: gl.constexpr,
):  # fmt: skip
    S: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [gl.num_warps(), 1], [16, BN, 16])
    O: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [gl.num_warps(), 1], [16, BD, 16])
    ROWS: gl.constexpr = gl.SliceLayout(1, S)
    H: gl.constexpr = HQ // G
    block = gl.num_programs(1) - 1 - gl.program_id(1)
    batch = gl.program_id(0) // HQ
    query_head = gl.program_id(0) % HQ
    head = query_head // G
    start = block * BM
    LOG_BETA += (batch * H + head).to(gl.int64) * padded
    t = start + gl.arange(0, BM, layout=ROWS)
    vector = gl.program_id(0).to(gl.int64) * padded + t
    # padded to whole blocks of 128 queries
    lse = gl.load(LSE + vector) * qk_scale
    delta = gl.load(DELTA + vector)

    query_buffer = gl.allocate_shared_memory(queries.dtype, [1, 1, 1, BM, BD], queries.layout)
    gradient_buffer = gl.allocate_shared_memory(gradients.dtype, [1, 1, 1, BM, BDV], gradients.layout)
    key_buffers = gl.allocate_shared_memory(keys.dtype, [2, 1, 1, BN, BD], keys.layout)
    value_buffers = gl.allocate_shared_memory(values.dtype, [2, 1, 1, BN, BDV], values.layout)
    query_ready = gl.allocate_shared_memory(gl.int64, [1, 1], mbarrier.MBarrierLayout())
    gradient_ready = gl.allocate_shared_memory(gl.int64, [1, 1], mbarrier.MBarrierLayout())
    key_ready = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    value_ready = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    mbarrier.init(query_ready.index(0), count=1)
    mbarrier.init(gradient_ready.index(0), count=1)
    for slot in gl.static_range(2):
        mbarrier.init(key_ready.index(slot), count=1)
        mbarrier.init(value_ready.index(slot), count=1)
    synchronize()

    first = t
    begin = 0
    inner = 0
    if SPANS:
        first = gl.load(FIRST + batch.to(gl.int64) * T + t, mask=t < T, other=T)
        begin = gl.min(first, 0) // BN * BN
        inner = gl.cdiv(gl.max(first, 0), BN) * BN
    begin = gl.minimum(begin, start)
    top = start + BM - BN
    blocks = (top - begin) // BN + 1
    diagonal = gl.minimum(BM // BN, blocks)
    whole = gl.maximum(gl.minimum((top - inner) // BN + 1, blocks), diagonal)

    load(queries, batch, query_head, start, 0, query_buffer, query_ready)
    load(gradients, batch, query_head, start, 0, gradient_buffer, gradient_ready)
    load(keys, batch, head, top, 0, key_buffers, key_ready)
    load(values, batch, head, top, 0, value_buffers, value_ready)
    if blocks > 1:
        load(keys, batch, head, top - BN, 1, key_buffers, key_ready)
        load(values, batch, head, top - BN, 1, value_buffers, value_ready)
    d_query = in_flight(gl.full([BM, BD], 0.0, gl.float32, layout=O))
    d_logits = gl.full([BM, BN], 0.0, queries.dtype, layout=gl.DotOperandLayout(0, O, 2))
    mbarrier.wait(query_ready.index(0), 0)
    mbarrier.wait(gradient_ready.index(0), 0)
    query = query_buffer.index(0).reshape([BM, BD])
    gradient = gradient_buffer.index(0).reshape([BM, BDV])

    for index in range(0, diagonal):
        d_query, d_logits = _query_step(
            d_query, d_logits, query, gradient, lse, delta, keys, values, key_buffers, value_buffers, key_ready,
            value_ready, LOG_BETA, first, batch, head, start, top, index, blocks, qk_scale, S, O, BM, BN, BD, BDV,
            True, SPANS,
        )  # fmt: skip
    for index in range(diagonal, whole):
        d_query, d_logits = _query_step(
            d_query, d_logits, query, gradient, lse, delta, keys, values, key_buffers, value_buffers, key_ready,
            value_ready, LOG_BETA, first, batch, head, start, top, index, blocks, qk_scale, S, O, BM, BN, BD, BDV,
            False, False,
        )  # fmt: skip
    if SPANS:
        for index in range(whole, blocks):
            d_query, d_logits = _query_step(
                d_query, d_logits, query, gradient, lse, delta, keys, values, key_buffers, value_buffers, key_ready,
                value_ready, LOG_BETA, first, batch, head, start, top, index, blocks, qk_scale, S, O, BM, BN, BD,
                BDV, True, True,
            )  # fmt: skip

    d_query, d_logits = warpgroup_mma_wait(0, deps=[d_query, d_logits])
    synchronize()
    query.store((d_query * scale).to(d_queries.dtype))
    fence()
    synchronize()
    copy_out(d_queries, [batch, query_head, start, 0], query_buffer.index(0))
    tma.store_wait(0)
