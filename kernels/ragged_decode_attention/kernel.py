"""The Triton kernels of ragged_decode_attention: parts of a head's slots, and the sum over parts. See README.md."""

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

LOG2_E: tl.constexpr = tl.constexpr(1.4426950408889634)
MINUS_INF: tl.constexpr = tl.constexpr(float("-inf"))


@triton.jit
def _find_part(part, head, table, size, length, UNIFORM: tl.constexpr):
    """Head, its first slot, its slots, and this part's first slot in it: by arithmetic or from the table."""
    if UNIFORM:
        return head, head * size, size, part * length
    else:
        table += part * 4
        return tl.load(table), tl.load(table + 1), tl.load(table + 2), tl.load(table + 3)


@triton.jit
def _tanh(x):
    """To some units of the last place: below 1/4 a series, as 1 - exp(-2 x) would lose its digits there."""
    square = x * x
    series = square * (62.0 / 2835.0) - 17.0 / 315.0
    series = (series * square + 2.0 / 15.0) * square - 1.0 / 3.0
    return tl.where(square < 0.0625, x + x * (square * series), 2.0 * tl.sigmoid(2.0 * x) - 1.0)


@triton.jit
def _logits(query, keys, qk_scale, softcap, SOFTCAP: tl.constexpr, PRECISION: tl.constexpr):
    """Logits [BM, BN] in units of log2."""
    logits = tl.dot(query, tl.trans(keys), input_precision=PRECISION) * qk_scale
    if SOFTCAP:  # softcap * tanh(x / softcap), and qk_scale has the division
        logits = softcap * LOG2_E * _tanh(logits)
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
    table,  # [P, 4]
    size,
    length,  # slots of a part
    per_head,  # parts of a head, if UNIFORM
    all_parts,  # P
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
    ROW_BLOCKS: tl.constexpr,
    SPLIT: tl.constexpr,  # whether any head has more than one part
    UNIFORM: tl.constexpr,
    IS_RUN: tl.constexpr,
    SOFTCAP: tl.constexpr,
    HAS_SINKS: tl.constexpr,
    HAS_RECEIVED: tl.constexpr,
    PRECISION: tl.constexpr,
    SUM_BEGINS_EARLY: tl.constexpr,
):
    if SUM_BEGINS_EARLY:
        gdc_launch_dependents()
    part, row_block, batch_row = tl.program_id(0) // ROW_BLOCKS, tl.program_id(0) % ROW_BLOCKS, tl.program_id(2)
    head, first_slot, size, begin = _find_part(part, tl.program_id(1), table, size, length, UNIFORM)
    row_count = G * tokens
    row = row_block * BM + tl.arange(0, BM)
    inside = row < row_count
    column, value_column, entry = tl.arange(0, BD), tl.arange(0, BDV), tl.arange(0, BN)
    query += batch_row.to(tl.int64) * query_stride_b
    query += (head * G + row // tokens)[:, None] * query_stride_h + (row % tokens)[:, None] * query_stride_t
    query += column[None, :]
    query_mask = inside[:, None] & (column < D)[None, :]
    q = tl.load(query, mask=query_mask, other=0.0)
    top = tl.full((BM,), MINUS_INF, tl.float32)
    total = tl.zeros((BM,), tl.float32)
    acc = tl.zeros((BM, BDV), tl.float32)
    if IS_RUN and begin >= size:  # the part of a head that is the run itself, each token up to its own query
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

    if SPLIT:
        place = (batch_row.to(tl.int64) * all_parts + part + UNIFORM * head * per_head) * row_count + row
        acc = acc / tl.where(total == 0.0, 1.0, total)[:, None]
        tl.store(
            partial + place[:, None] * DV + value_column[None, :],
            acc,
            mask=inside[:, None] & (value_column < DV)[None, :],
        )
        tl.store(partial_lses + place, top + tl.math.log2(total), mask=inside)
    else:
        query_head = head * G + row // tokens
        if HAS_SINKS:
            sink = tl.load(sinks + query_head, mask=inside, other=0.0).to(tl.float32) * LOG2_E
            new_top = tl.maximum(top, sink)
            fading = tl.math.exp2(top - new_top)
            total, acc = total * fading + tl.math.exp2(sink - new_top), acc * fading[:, None]
            top = new_top
        acc = acc / tl.where(total == 0.0, 1.0, total)[:, None]
        place = (batch_row.to(tl.int64) * tokens + row % tokens) * HQ + query_head
        tl.store(
            output + place[:, None] * DV + value_column[None, :],
            acc.to(output.dtype.element_ty),
            mask=inside[:, None] & (value_column < DV)[None, :],
        )
        if HAS_RECEIVED:
            tl.store(lses + batch_row * HQ + query_head, top + tl.math.log2(total), mask=inside)


@triton.jit
def sum_parts(
    partial,  # [B, P, R, Dv]
    partial_lses,  # [B, P, R]
    sinks,  # [HQ]
    output,  # [B, n, HQ, Dv]
    lses,  # [B, HQ]
    head_parts,  # [H, 2]
    per_head,
    all_parts,
    tokens,
    HQ: tl.constexpr,
    G: tl.constexpr,
    DV: tl.constexpr,
    BDV: tl.constexpr,
    PARTS_AT_A_TIME: tl.constexpr,
    HAS_SINKS: tl.constexpr,
    HAS_RECEIVED: tl.constexpr,
    UNIFORM: tl.constexpr,
    SUM_BEGINS_EARLY: tl.constexpr,
):
    """The softmax of one query over all parts of its head, in order, so that two runs give the same bits."""
    if SUM_BEGINS_EARLY:
        gdc_wait()
    row, head, batch_row = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    if UNIFORM:
        count, first_part = per_head, head * per_head
    else:
        count, first_part = tl.load(head_parts + 2 * head), tl.load(head_parts + 2 * head + 1)
    query_head = head * G + row // tokens
    row_count = G * tokens
    column, part = tl.arange(0, BDV), tl.arange(0, PARTS_AT_A_TIME)
    place = (batch_row.to(tl.int64) * all_parts + first_part + part) * row_count + row
    one = tl.arange(0, 1)
    top, total = tl.full((1,), MINUS_INF, tl.float32), tl.zeros((1,), tl.float32)
    if HAS_SINKS:
        top, total = tl.load(sinks + query_head + one).to(tl.float32) * LOG2_E, total + 1.0
    acc = tl.zeros((BDV,), tl.float32)
    for begin in range(0, count, PARTS_AT_A_TIME):
        there = begin + part < count
        part_output = tl.load(
            partial + place[:, None] * DV + column[None, :], mask=there[:, None] & (column < DV)[None, :], other=0.0
        )
        part_lse = tl.load(partial_lses + place, mask=there, other=MINUS_INF)
        new_top = tl.maximum(top, tl.max(part_lse, 0, keep_dims=True))
        reference = tl.where(new_top == MINUS_INF, 0.0, new_top)
        weights, fading = tl.math.exp2(part_lse - reference), tl.math.exp2(top - reference)
        total = total * fading + tl.sum(weights, 0, keep_dims=True)
        acc = acc * fading + tl.sum(part_output * weights[:, None], 0)
        top = new_top
        place += PARTS_AT_A_TIME * row_count
    acc = acc / tl.where(total == 0.0, 1.0, total)
    at = (batch_row.to(tl.int64) * tokens + row % tokens) * HQ + query_head
    tl.store(output + at * DV + column, acc.to(output.dtype.element_ty), mask=column < DV)
    if HAS_RECEIVED:  # of one token
        tl.store(lses + batch_row * HQ + query_head + one, top + tl.math.log2(total))


@triton.jit
def sum_received(
    logits,  # [B, G, N]
    lses,  # [B, HQ]
    positions,  # [B, N]
    received,  # [B, N]
    table,
    size,
    length,
    slots,
    HQ: tl.constexpr,
    G: tl.constexpr,
    BLOCK: tl.constexpr,
    UNIFORM: tl.constexpr,
):
    """Returns the attention that each slot received from the G queries that read it."""
    batch_row = tl.program_id(2)
    head, first_slot, size, begin = _find_part(tl.program_id(0), tl.program_id(1), table, size, length, UNIFORM)
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
