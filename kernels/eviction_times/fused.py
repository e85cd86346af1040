"""Eviction times in Triton: one program walks one head of one row through all steps. See README.md."""

import torch
import triton
import triton.language as tl

ENTRIES_PER_WARP = 512  # by measurement on an H100 (recipes/bench/eviction_times.py); one warp needs no barrier
MOST_WARPS = 16

NOBODY: tl.constexpr = tl.constexpr(2**30)  # the position in an empty slot: its age is negative at every step
LAST_IN_ORDER: tl.constexpr = tl.constexpr(2**31 - 1)
PADDING, EVICTABLE, PROTECTED = (tl.constexpr(kind) for kind in range(3))


def eviction_times(
    score: torch.Tensor,
    budgets: torch.Tensor,
    *,
    linear_in_age: bool,
    largest_budget: int,
    buffer_size: int = 1,
    protected: torch.Tensor | None = None,
    recent: torch.Tensor | None = None,
    valid: torch.Tensor | None = None,
) -> torch.Tensor:
    """Arguments and result as in the package's `eviction_times`; largest_budget is max(budgets), on the host."""
    batch, heads, tokens = score.shape
    times = torch.full((batch, heads, tokens), tokens, device=score.device)
    kinds = None
    if valid is not None or protected is not None:
        kinds = torch.full((batch, tokens), EVICTABLE.value, dtype=torch.int8, device=score.device)
        if protected is not None:
            kinds.masked_fill_(protected, PROTECTED.value)
        if valid is not None:
            kinds.masked_fill_(~valid, PADDING.value)
            times.masked_fill_(~valid[:, None], 0)
    block = max(32, triton.next_power_of_2(min(largest_budget + buffer_size, tokens)))
    with torch.cuda.device_of(score):
        _walk[(batch * heads,)](
            score.contiguous(),
            kinds,
            budgets,
            recent,
            times,
            heads,
            tokens,
            buffer_size,
            LINEAR_IN_AGE=linear_in_age,
            HAS_KINDS=kinds is not None,
            HAS_RECENT=recent is not None,
            BLOCK=block,
            num_warps=min(MOST_WARPS, max(1, block // ENTRIES_PER_WARP)),
        )
    return times


@triton.jit(do_not_specialize=["heads", "tokens"])
def _walk(
    score,  # [B, H, T]
    kinds,  # [B, T]
    budgets,  # [H]
    recent,  # [H]
    times,  # [B, H, T], T for what is never evicted
    heads,
    tokens,
    buffer_size,
    LINEAR_IN_AGE: tl.constexpr,
    HAS_KINDS: tl.constexpr,
    HAS_RECENT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0)
    head = row % heads
    score += row.to(tl.int64) * tokens
    times += row.to(tl.int64) * tokens
    if HAS_KINDS:
        kinds += (row // heads).to(tl.int64) * tokens
    budget = tl.load(budgets + head).to(tl.int32)
    youngest = tl.maximum(tl.load(recent + head).to(tl.int32), 0) if HAS_RECENT else 0  # the age that may be evicted

    # What the head holds lies in slots, in no order. Protected tokens need none: they only count.
    positions = tl.full((BLOCK,), NOBODY, tl.int32)
    scores = tl.zeros((BLOCK,), tl.float32)
    turn = tl.arange(0, BLOCK)  # the turn at which a slot is filled next; -1 for those in use
    turns_taken = 0
    held = 0
    # read one step ahead: nothing waits for memory
    next_score = tl.load(score)
    next_kind = tl.load(kinds).to(tl.int32) if HAS_KINDS else EVICTABLE
    for step in range(tokens):
        new_score, kind = next_score, next_kind
        ahead = tl.minimum(step + 1, tokens - 1)
        next_score = tl.load(score + ahead)
        if HAS_KINDS:
            next_kind = tl.load(kinds + ahead).to(tl.int32)
        if kind == EVICTABLE:
            free = turn == turns_taken
            positions = tl.where(free, step, positions)
            scores = tl.where(free, new_score, scores)
            turns_taken += 1
        if kind != PADDING:
            held += 1
        if held == budget + buffer_size:
            turn = tl.full((BLOCK,), -1, tl.int32)
            for victim in range(buffer_size):
                ages = step - positions
                if LINEAR_IN_AGE:
                    priority = ages.to(tl.float32) * scores
                else:
                    priority = scores
                # As integers in the same order, which a warp compares in one instruction. Adding 0 makes -0 equal 0.
                order = (priority + 0.0).to(tl.int32, bitcast=True)
                order = order ^ ((order >> 31) & 0x7FFFFFFF)
                order = tl.where(ages >= youngest, order, LAST_IN_ORDER)
                lowest = tl.min(order, 0)
                position = tl.min(tl.where(order == lowest, positions, NOBODY), 0)
                tl.store(times + position, step + 1)
                evicted = positions == position
                turn = tl.where(evicted, victim, turn)
                positions = tl.where(evicted, NOBODY, positions)
            turns_taken = 0
            held = budget
