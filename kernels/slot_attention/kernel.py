"""The Triton kernels of slot_attention: parts of a head's slots, and the sum over parts. See README.md."""

import triton
import triton.language as tl

LOG2_E: tl.constexpr = tl.constexpr(1.4426950408889634)
MINUS_INF: tl.constexpr = tl.constexpr(float("-inf"))


@triton.jit
def _find_part(part, table, size, length, parts, UNIFORM: tl.constexpr):
    """Head, its first slot, its slots, this part's first slot in the head, parts of the head, the first of them."""
    if UNIFORM:
        head = part // parts
        return head, head * size, size, (part - head * parts) * length, parts, head * parts
    else:
        table += part * 6
        return (
            tl.load(table),
            tl.load(table + 1),
            tl.load(table + 2),
            tl.load(table + 3),
            tl.load(table + 4),
            tl.load(table + 5),
        )


@triton.jit
def _logits(query, keys, qk_scale, softcap, SOFTCAP: tl.constexpr, PRECISION: tl.constexpr):
    """Logits [BM, BN] in units of log2."""
    logits = tl.dot(query, tl.trans(keys), input_precision=PRECISION) * qk_scale
    if SOFTCAP:  # softcap * tanh(x / softcap), and qk_scale has the division
        logits = softcap * LOG2_E * (2.0 * tl.sigmoid(2.0 * logits) - 1.0)
    return logits


@triton.jit
def _add(logits, values, top, total, acc, PRECISION: tl.constexpr):
    """The softmax and its sum over values, BN entries further; logits of -inf do not count."""
    new_top = tl.maximum(top, tl.max(logits, 1))
    reference = tl.where(new_top == MINUS_INF, 0.0, new_top)
    weights = tl.math.exp2(logits - reference[:, None])
    fading = tl.math.exp2(top - reference)
    total = total * fading + tl.sum(weights, 1)
    acc = tl.dot(weights.to(values.dtype), values, acc * fading[:, None], input_precision=PRECISION)
    return new_top, total, acc


@triton.jit
def _store_rows(
    acc,
    lse,
    output,
    lses,
    row,
    row_count,
    head,
    batch_row,
    tokens,
    HQ: tl.constexpr,
    G: tl.constexpr,
    DV: tl.constexpr,
    BDV: tl.constexpr,
    HAS_LSES: tl.constexpr,
):
    """Output [rows, BDV] of a head's queries, and the log2 of their softmax's denominators."""
    column = tl.arange(0, BDV)
    query_head = head * G + row // tokens
    at = (batch_row.to(tl.int64) * tokens + row % tokens) * HQ + query_head
    inside = row < row_count
    mask = inside[:, None] & (column < DV)[None, :]
    tl.store(output + at[:, None] * DV + column[None, :], acc.to(output.dtype.element_ty), mask=mask)
    if HAS_LSES:  # of one token
        tl.store(lses + batch_row * HQ + query_head, lse, mask=inside)


@triton.jit
def _sum_parts(
    partial,
    partial_lses,
    sinks,
    output,
    lses,
    head,
    batch_row,
    first_part,
    count,
    all_parts,
    row,
    row_count,
    tokens,
    HQ: tl.constexpr,
    G: tl.constexpr,
    DV: tl.constexpr,
    BDV: tl.constexpr,
    BM: tl.constexpr,
    PARTS_AT_A_TIME: tl.constexpr,
    HAS_SINKS: tl.constexpr,
    HAS_LSES: tl.constexpr,
):
    """The softmax over all parts of a head for the queries `row`; in order, so that two runs give the same bits."""
    column = tl.arange(0, BDV)
    at = (batch_row.to(tl.int64) * all_parts + first_part) * row_count
    inside = row < row_count
    top = tl.full((BM,), MINUS_INF, tl.float32)
    total = tl.zeros((BM,), tl.float32)
    if HAS_SINKS:
        top = tl.load(sinks + head * G + row // tokens, mask=inside, other=MINUS_INF).to(tl.float32) * LOG2_E
        total = tl.where(inside, 1.0, 0.0)
    acc = tl.zeros((BM, BDV), tl.float32)
    some = tl.arange(0, PARTS_AT_A_TIME)
    for begin in range(0, count, PARTS_AT_A_TIME):
        places = at + (begin + some)[:, None] * row_count + row[None, :]
        there = (begin + some < count)[:, None] & inside[None, :]
        part_lse = tl.load(partial_lses + places, mask=there, other=MINUS_INF, cache_modifier=".cg")
        part_output = tl.load(
            partial + places[:, :, None] * DV + column[None, None, :],
            mask=there[:, :, None] & (column < DV)[None, None, :],
            other=0.0,
            cache_modifier=".cg",
        )
        new_top = tl.maximum(top, tl.max(part_lse, 0))
        reference = tl.where(new_top == MINUS_INF, 0.0, new_top)
        weights = tl.math.exp2(part_lse - reference[None, :])
        fading = tl.math.exp2(top - reference)
        total = total * fading + tl.sum(weights, 0)
        acc = acc * fading[:, None] + tl.sum(part_output * weights[:, :, None], 0)
        top = new_top
    acc = acc / tl.where(total == 0.0, 1.0, total)[:, None]
    lse = top + tl.math.log2(total)
    _store_rows(acc, lse, output, lses, row, row_count, head, batch_row, tokens, HQ, G, DV, BDV, HAS_LSES)


@triton.jit
def attend_parts(
    query,  # [B, HQ, n, D]
    keys,  # [B, N, D]
    values,  # [B, N, Dv]
    positions,  # [B, N]
    new_key,  # [B, H, n, D], of a run
    new_value,  # [B, H, n, Dv]
    new_positions,  # [B, n]
    sinks,  # [HQ]
    output,  # [B, n, HQ, Dv]
    partial,  # [B, P, R, Dv], R = G * n queries of a KV head
    partial_lses,  # [B, P, R]
    logits_out,  # [B, G, N]
    lses,  # [B, HQ]
    arrivals,  # [B, H * row blocks], zeros
    table,  # [P, 6]
    size,
    length,  # slots of a part
    parts,  # of every head, if UNIFORM
    slots,
    tokens,  # n
    query_stride_b,
    query_stride_h,
    query_stride_t,
    key_stride_b,
    key_stride_h,
    key_stride_t,
    value_stride_b,
    value_stride_h,
    value_stride_t,
    new_position_stride,
    qk_scale,
    softcap,
    HQ: tl.constexpr,
    G: tl.constexpr,
    D: tl.constexpr,
    DV: tl.constexpr,
    BD: tl.constexpr,
    BDV: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BR: tl.constexpr,  # rows of the chunk's own keys, n rounded up
    STAGES: tl.constexpr,
    ONE_TILE: tl.constexpr,  # whether a part is BN slots
    UNIFORM: tl.constexpr,
    IS_RUN: tl.constexpr,
    SOFTCAP: tl.constexpr,
    HAS_SINKS: tl.constexpr,
    HAS_RECEIVED: tl.constexpr,
    IN_ONE: tl.constexpr,  # the last part of a head to finish sums over all
    SUM_ROWS: tl.constexpr,
    PARTS_AT_A_TIME: tl.constexpr,
    PRECISION: tl.constexpr,
):
    part_index, row_block, batch_row = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    all_parts = tl.num_programs(0)
    head, first_slot, size, begin, count, first_part = _find_part(part_index, table, size, length, parts, UNIFORM)
    row_count = G * tokens
    row = row_block * BM + tl.arange(0, BM)
    inside = row < row_count
    column, value_column, entry = tl.arange(0, BD), tl.arange(0, BDV), tl.arange(0, BN)
    query += batch_row.to(tl.int64) * query_stride_b
    query += (head * G + row // tokens)[:, None] * query_stride_h + (row % tokens)[:, None] * query_stride_t
    query += column[None, :]
    query_mask = inside[:, None] & (column < D)[None, :]
    if not ONE_TILE:
        q = tl.load(query, mask=query_mask, other=0.0)
    top = tl.full((BM,), MINUS_INF, tl.float32)
    total = tl.zeros((BM,), tl.float32)
    acc = tl.zeros((BM, BDV), tl.float32)
    if IS_RUN and begin >= size:  # the part of a head that is the run itself, each token up to its own query
        if ONE_TILE:
            q = tl.load(query, mask=query_mask, other=0.0)
        own = tl.arange(0, BR)
        key_at = batch_row.to(tl.int64) * key_stride_b + head * key_stride_h
        k = tl.load(
            new_key + key_at + own[:, None] * key_stride_t + column[None, :],
            mask=(own < tokens)[:, None] & (column < D)[None, :],
            other=0.0,
        )
        value_at = batch_row.to(tl.int64) * value_stride_b + head * value_stride_h
        v = tl.load(
            new_value + value_at + own[:, None] * value_stride_t + value_column[None, :],
            mask=(own < tokens)[:, None] & (value_column < DV)[None, :],
            other=0.0,
        )
        is_real = tl.load(new_positions + batch_row * new_position_stride + own, mask=own < tokens, other=-1) >= 0
        logits = _logits(q, k, qk_scale, softcap, SOFTCAP, PRECISION)
        logits = tl.where(is_real[None, :] & (own[None, :] <= (row % tokens)[:, None]), logits, MINUS_INF)
        top, total, acc = _add(logits, v, top, total, acc, PRECISION)
    else:
        base = batch_row.to(tl.int64) * slots + first_slot
        end = tl.minimum(begin + length, size)
        for first in tl.range(begin, end, BN, num_stages=STAGES):
            slot = first + entry
            exists = slot < end
            if ONE_TILE:
                # With keys and values in one wait for memory: outside of the loop the queries would be waited for
                # first. That nothing is added must not show, or the load would be moved there.
                q = tl.load(query + tl.minimum(first - begin, 0), mask=query_mask, other=0.0)
            held = tl.load(positions + base + slot, mask=exists, other=-1)
            k = tl.load(
                keys + (base + slot)[:, None] * D + column[None, :],
                mask=exists[:, None] & (column < D)[None, :],
                other=0.0,
            )
            v = tl.load(
                values + (base + slot)[:, None] * DV + value_column[None, :],
                mask=exists[:, None] & (value_column < DV)[None, :],
                other=0.0,
            )
            logits = _logits(q, k, qk_scale, softcap, SOFTCAP, PRECISION)
            logits = tl.where((held >= 0)[None, :], logits, MINUS_INF)
            if HAS_RECEIVED:
                place = (batch_row.to(tl.int64) * G + row)[:, None] * slots + (first_slot + slot)[None, :]
                tl.store(logits_out + place, logits, mask=inside[:, None] & exists[None, :])
            top, total, acc = _add(logits, v, top, total, acc, PRECISION)

    if count == 1:
        if HAS_SINKS:
            sink = tl.load(sinks + head * G + row // tokens, mask=inside, other=MINUS_INF).to(tl.float32) * LOG2_E
            new_top = tl.maximum(top, sink)
            fading = tl.math.exp2(top - new_top)
            total, acc = total * fading + tl.math.exp2(sink - new_top), acc * fading[:, None]
            top = new_top
        acc = acc / tl.where(total == 0.0, 1.0, total)[:, None]
        lse = top + tl.math.log2(total)
        _store_rows(acc, lse, output, lses, row, row_count, head, batch_row, tokens, HQ, G, DV, BDV, HAS_RECEIVED)
    else:
        place = (batch_row.to(tl.int64) * all_parts + part_index) * row_count + row
        acc = acc / tl.where(total == 0.0, 1.0, total)[:, None]
        tl.store(
            partial + place[:, None] * DV + value_column[None, :],
            acc,
            mask=inside[:, None] & (value_column < DV)[None, :],
        )
        tl.store(partial_lses + place, top + tl.math.log2(total), mask=inside)
        if IN_ONE:
            arrivals += (batch_row * (HQ // G) + head) * tl.num_programs(1) + row_block
            tl.debug_barrier()  # all threads have stored
            if tl.atomic_add(arrivals, 1, sem="acq_rel") == count - 1:
                tl.store(arrivals, 0)  # as the next call wants to find it
                _sum_parts(
                    partial,
                    partial_lses,
                    sinks,
                    output,
                    lses,
                    head,
                    batch_row,
                    first_part,
                    count,
                    all_parts,
                    row_block * BM + tl.arange(0, SUM_ROWS),
                    row_count,
                    tokens,
                    HQ,
                    G,
                    DV,
                    BDV,
                    SUM_ROWS,
                    PARTS_AT_A_TIME,
                    HAS_SINKS,
                    HAS_RECEIVED,
                )


@triton.jit
def sum_parts(
    partial,
    partial_lses,
    sinks,
    output,
    lses,
    head_parts,  # [H, 2], how many parts a head has and the first of them
    all_parts,
    tokens,
    HQ: tl.constexpr,
    G: tl.constexpr,
    DV: tl.constexpr,
    BDV: tl.constexpr,
    SUM_ROWS: tl.constexpr,
    PARTS_AT_A_TIME: tl.constexpr,
    HAS_SINKS: tl.constexpr,
    HAS_RECEIVED: tl.constexpr,
):
    """What the last part does in `attend_parts` if it may, as a launch of its own."""
    head, row_block, batch_row = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    count, first_part = tl.load(head_parts + 2 * head), tl.load(head_parts + 2 * head + 1)
    if count > 1:
        _sum_parts(
            partial,
            partial_lses,
            sinks,
            output,
            lses,
            head,
            batch_row,
            first_part,
            count,
            all_parts,
            row_block * SUM_ROWS + tl.arange(0, SUM_ROWS),
            G * tokens,
            tokens,
            HQ,
            G,
            DV,
            BDV,
            SUM_ROWS,
            PARTS_AT_A_TIME,
            HAS_SINKS,
            HAS_RECEIVED,
        )


@triton.jit
def sum_received(
    logits,  # [B, G, N]
    lses,  # [B, HQ]
    positions,  # [B, N]
    received,  # [B, N]
    table,
    size,
    length,
    parts,
    slots,
    HQ: tl.constexpr,
    G: tl.constexpr,
    BLOCK: tl.constexpr,
    UNIFORM: tl.constexpr,
):
    """What each slot received of the G queries that read it."""
    batch_row = tl.program_id(1)
    head, first_slot, size, begin, _, _ = _find_part(tl.program_id(0), table, size, length, parts, UNIFORM)
    end = tl.minimum(begin + length, size)
    for first in range(begin, end, BLOCK):
        slot = first + tl.arange(0, BLOCK)
        at = batch_row.to(tl.int64) * slots + first_slot + slot
        there = (slot < end) & (tl.load(positions + at, mask=slot < end, other=-1) >= 0)
        total = tl.zeros((BLOCK,), tl.float32)
        for member in tl.static_range(G):
            lse = tl.load(lses + batch_row * HQ + head * G + member)
            place = (batch_row.to(tl.int64) * G + member) * slots + first_slot + slot
            total += tl.math.exp2(tl.load(logits + place, mask=there, other=MINUS_INF) - lse)
        tl.store(received + at, tl.where(there, total, 0.0), mask=slot < end)
