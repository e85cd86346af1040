"""The forward kernel for Hopper GPUs: one warp copies, two groups of four warps compute, at a pace of their own.

The same arithmetic as forward.py, in Gluon, Triton's language of explicit layouts and barriers. While one group is at
its softmax the matrix units work for the other, and within a group on the values of the block before.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma, warpgroup_mma, warpgroup_mma_wait

from retention_gates.kernels.retention_attention.hopper import copy_out, fence, load, release, span, synchronize


@gluon.jit
def _decayed(scores, log_beta, first, start, n, layout: gl.constexpr, BM: gl.constexpr, BN: gl.constexpr,
             MASKED: gl.constexpr, SPANS: gl.constexpr):  # fmt: skip
    """Scores of the queries start.. against the keys n.., with their decay and without what is not seen."""
    column = gl.arange(0, BN, layout=gl.SliceLayout(0, layout))
    row = gl.arange(0, BM, layout=gl.SliceLayout(1, layout))
    base = ((start - n) - (column & 7)).to(gl.float32) - (column & -8).to(gl.float32)
    scores = row.to(gl.float32)[:, None] * log_beta[None, :] + (scores + (base * log_beta)[None, :])
    if MASKED:
        seen = (start + row)[:, None] >= (n + column)[None, :]
        if SPANS:
            seen = seen & ((n + column)[None, :] >= first[:, None])
        scores = gl.where(seen, scores, float("-inf"))
    return scores


@gluon.jit
def _softmax(scores, total, highest, qk_scale, MASKED: gl.constexpr):
    """Weights of one block of keys, the running sum and maximum, and by what earlier weights shrink."""
    higher = gl.maximum(highest, gl.max(scores, 1))
    shift = higher
    if MASKED:
        shift = gl.where(higher == float("-inf"), 0.0, higher)
    weights = gl.exp2(scores * qk_scale - (shift * qk_scale)[:, None])
    shrink = gl.exp2((highest - shift) * qk_scale)
    total = total * shrink + gl.sum(weights, 1)
    return weights, total, higher, shrink


@gluon.jit
def _step(
    accumulator, weights, total, highest, query, key_buffers, value_buffers, key_ready, value_ready, key_free,
    value_free, LOG_BETA, first, start, top, index, qk_scale,
    S: gl.constexpr, O: gl.constexpr, BM: gl.constexpr, BN: gl.constexpr, BD: gl.constexpr, BDV: gl.constexpr,
    MASKED: gl.constexpr, SPANS: gl.constexpr,
):  # fmt: skip
    """Weighs the values of block index - 1, counted from the diagonal down, while it makes the weights of `index`."""
    n = top - index * BN
    before = index - 1
    log_beta = gl.load(LOG_BETA + n + gl.arange(0, BN, layout=gl.SliceLayout(0, S)))
    mbarrier.wait(key_ready.index(index & 1), (index >> 1) & 1)
    key = key_buffers.index(index & 1).reshape([BN, BD])
    empty = gl.full([BM, BN], 0.0, gl.float32, layout=S)
    scores = warpgroup_mma(query, key.permute((1, 0)), empty, use_acc=False, is_async=True)
    mbarrier.wait(value_ready.index(before & 1), (before >> 1) & 1)
    value = value_buffers.index(before & 1).reshape([BN, BDV])
    accumulator = warpgroup_mma(weights, value, accumulator, is_async=True)
    scores = warpgroup_mma_wait(1, deps=[scores])
    scores = _decayed(scores, log_beta, first, start, n, S, BM, BN, MASKED, SPANS)
    fresh, total, highest, shrink = _softmax(scores, total, highest, qk_scale, MASKED)
    fresh = gl.convert_layout(fresh.to(value.dtype), gl.DotOperandLayout(0, O, 2))
    # naming what is to be ready before the wait keeps the compiler from computing it afterwards
    accumulator, weights, fresh, shrink = warpgroup_mma_wait(0, deps=[accumulator, weights, fresh, shrink])
    synchronize()  # one thread speaks for its group
    mbarrier.arrive(key_free.index(index & 1), count=1)
    mbarrier.arrive(value_free.index(before & 1), count=1)
    accumulator = accumulator * gl.convert_layout(shrink, gl.SliceLayout(1, O))[:, None]
    return accumulator, fresh, total, highest


@gluon.jit
def _compute(
    PART: gl.constexpr, query_buffers, key_buffers, value_buffers, query_ready, key_ready, value_ready, key_free,
    value_free, outputs, LOG_BETA, LSE, SINKS, FIRST, T, padded, qk_scale, batch, query_head, head, block,
    HQ: gl.constexpr, G: gl.constexpr, BD: gl.constexpr, BDV: gl.constexpr, BM: gl.constexpr, BN: gl.constexpr,
    SPANS: gl.constexpr, HAS_SINKS: gl.constexpr,
):  # fmt: skip
    """Half of a block's queries, BM = 64 of them."""
    S: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BN, 16])
    O: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BDV, 16])
    ROWS: gl.constexpr = gl.SliceLayout(1, S)
    start = block * (2 * BM) + PART * BM
    LOG_BETA += (batch * (HQ // G) + head).to(gl.int64) * padded
    # both halves walk through the same blocks of keys, so that one copy serves both
    _, begin, _ = span(FIRST, batch, block * (2 * BM), T, 2 * BM, BN, SPANS, ROWS)
    first, _, inner = span(FIRST, batch, start, T, BM, BN, SPANS, ROWS)
    top = block * (2 * BM) + 2 * BM - BN
    blocks = (top - begin) // BN + 1

    highest = gl.full([BM], float("-inf"), gl.float32, layout=ROWS)
    total = gl.full([BM], 0.0, gl.float32, layout=ROWS)
    if HAS_SINKS:
        highest = gl.full([BM], 0.0, gl.float32, layout=ROWS) + gl.load(SINKS + query_head)
        total = gl.full([BM], 1.0, gl.float32, layout=ROWS)
    accumulator = gl.full([BM, BDV], 0.0, gl.float32, layout=O)

    # the weights of the block on the diagonal
    log_beta = gl.load(LOG_BETA + top + gl.arange(0, BN, layout=gl.SliceLayout(0, S)))
    mbarrier.wait(query_ready.index(PART), 0)
    mbarrier.wait(key_ready.index(0), 0)
    query = query_buffers.index(PART).reshape([BM, BD])
    empty = gl.full([BM, BN], 0.0, gl.float32, layout=S)
    scores = warpgroup_mma(query, key_buffers.index(0).reshape([BN, BD]).permute((1, 0)), empty, use_acc=False)
    release(key_free, 0)
    scores = _decayed(scores, log_beta, first, start, top, S, BM, BN, True, SPANS)
    fresh, total, highest, _ = _softmax(scores, total, highest, qk_scale, True)
    weights = gl.convert_layout(fresh.to(outputs.dtype), gl.DotOperandLayout(0, O, 2))

    # the rest of the diagonal, below it, and where documents or windows begin
    diagonal = gl.minimum(2 * BM // BN, blocks)
    whole = gl.maximum(gl.minimum((top - inner) // BN + 1, blocks), diagonal)
    for index in range(1, diagonal):
        accumulator, weights, total, highest = _step(
            accumulator, weights, total, highest, query, key_buffers, value_buffers, key_ready, value_ready, key_free,
            value_free, LOG_BETA, first, start, top, index, qk_scale, S, O, BM, BN, BD, BDV, True, SPANS,
        )  # fmt: skip
    for index in range(diagonal, whole):
        accumulator, weights, total, highest = _step(
            accumulator, weights, total, highest, query, key_buffers, value_buffers, key_ready, value_ready, key_free,
            value_free, LOG_BETA, first, start, top, index, qk_scale, S, O, BM, BN, BD, BDV, False, False,
        )  # fmt: skip
    if SPANS:
        for index in range(whole, blocks):
            accumulator, weights, total, highest = _step(
                accumulator, weights, total, highest, query, key_buffers, value_buffers, key_ready, value_ready,
                key_free, value_free, LOG_BETA, first, start, top, index, qk_scale, S, O, BM, BN, BD, BDV, True, True,
            )  # fmt: skip

    before = blocks - 1
    mbarrier.wait(value_ready.index(before & 1), (before >> 1) & 1)
    accumulator = warpgroup_mma(weights, value_buffers.index(before & 1).reshape([BN, BDV]), accumulator)

    t = start + gl.arange(0, BM, layout=ROWS)
    blind = total == 0.0
    total = gl.where(blind, 1.0, total)
    accumulator = accumulator / gl.convert_layout(total, gl.SliceLayout(1, O))[:, None]
    if SPANS:
        blind = blind | (first >= T)
    lse = gl.where(blind, float("inf"), highest + gl.log2(total) / qk_scale)
    gl.store(LSE + (batch * HQ + query_head).to(gl.int64) * padded + t, lse, mask=t < T)
    # the queries have been read: their place takes the output
    query_buffers.index(PART)._reinterpret(outputs.dtype, [1, 1, BM, BDV], outputs.layout).reshape([BM, BDV]).store(
        accumulator.to(outputs.dtype)
    )
    fence()
    copy_out(
        outputs,
        [batch, query_head, start, 0],
        query_buffers.index(PART)._reinterpret(outputs.dtype, [1, 1, BM, BDV], outputs.layout),
    )
    tma.store_wait(0)


@gluon.jit
def _copy(
    queries, keys, values, query_buffers, key_buffers, value_buffers, query_ready, key_ready, value_ready, key_free,
    value_free, FIRST, T, batch, query_head, head, block, BM: gl.constexpr, BN: gl.constexpr, SPANS: gl.constexpr,
):  # fmt: skip
    """Brings queries, keys and values in, as far ahead as there is room."""
    _, begin, _ = span(FIRST, batch, block * (2 * BM), T, 2 * BM, BN, SPANS, gl.BlockedLayout([1], [32], [1], [0]))
    top = block * (2 * BM) + 2 * BM - BN
    blocks = (top - begin) // BN + 1
    load(queries, batch, query_head, block * (2 * BM), 0, query_buffers, query_ready)
    load(queries, batch, query_head, block * (2 * BM) + BM, 1, query_buffers, query_ready)
    for index in range(0, blocks):
        slot = index & 1
        n = top - index * BN
        mbarrier.wait(key_free.index(slot), ((index >> 1) & 1) ^ 1)
        load(keys, batch, head, n, slot, key_buffers, key_ready)
        mbarrier.wait(value_free.index(slot), ((index >> 1) & 1) ^ 1)
        load(values, batch, head, n, slot, value_buffers, value_ready)


@gluon.jit
def attention_forward(
    queries, keys, values, outputs,
    LOG_BETA,  # [B, H, padded], over scale
    LSE,  # [B, HQ, padded]
    SINKS,  # [HQ], over scale
    FIRST,  # [B, T]
    T, padded, qk_scale,
    HQ: gl.constexpr, G: gl.constexpr, BD: gl.constexpr, BDV: gl.constexpr, BM: gl.constexpr, BN: gl.constexpr,
    SPANS: gl.constexpr, HAS_SINKS: gl.constexpr,
):  # fmt: skip
    block = gl.num_programs(1) - 1 - gl.program_id(1)
    batch = gl.program_id(0) // HQ
    query_head = gl.program_id(0) % HQ
    head = query_head // G
    query_buffers = gl.allocate_shared_memory(queries.dtype, [2, 1, 1, BM, BD], queries.layout)
    key_buffers = gl.allocate_shared_memory(keys.dtype, [2, 1, 1, BN, BD], keys.layout)
    value_buffers = gl.allocate_shared_memory(values.dtype, [2, 1, 1, BN, BDV], values.layout)
    query_ready = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    key_ready = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    value_ready = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    key_free = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    value_free = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    for slot in gl.static_range(2):
        mbarrier.init(query_ready.index(slot), count=1)
        mbarrier.init(key_ready.index(slot), count=1)
        mbarrier.init(value_ready.index(slot), count=1)
        mbarrier.init(key_free.index(slot), count=2)
        mbarrier.init(value_free.index(slot), count=2)
    fence()
    gl.warp_specialize(
        [
            (_compute, (0, query_buffers, key_buffers, value_buffers, query_ready, key_ready, value_ready, key_free,
             value_free, outputs, LOG_BETA, LSE, SINKS, FIRST, T, padded, qk_scale, batch, query_head, head, block,
             HQ, G, BD, BDV, BM, BN, SPANS, HAS_SINKS)),
            (_compute, (1, query_buffers, key_buffers, value_buffers, query_ready, key_ready, value_ready, key_free,
             value_free, outputs, LOG_BETA, LSE, SINKS, FIRST, T, padded, qk_scale, batch, query_head, head, block,
             HQ, G, BD, BDV, BM, BN, SPANS, HAS_SINKS)),
            (_copy, (queries, keys, values, query_buffers, key_buffers, value_buffers, query_ready, key_ready,
             value_ready, key_free, value_free, FIRST, T, batch, query_head, head, block, BM, BN, SPANS)),
        ],
        [4, 1],
        [240, 24],
    )  # fmt: skip
