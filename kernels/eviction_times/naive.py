"""Eviction times in plain torch: the reference, and what runs where there is no fused kernel."""

import torch

BLOCK = 64  # steps between two clean-ups of the window; 32 to 128 take the same time


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
    """Arguments and result as in the package's `eviction_times`; largest_budget is max(budgets), on the host.

    All heads of all rows, R = B * H, go through the steps together. What they hold lies in a window of columns ordered
    by position, so that argmin's rule (the first of equals) is the tie rule (the lowest position). The next BLOCK
    tokens are columns from the start; after them the evicted ones are dropped. Column 0 is nobody's: heads with
    nothing to evict choose it.
    """
    batch, heads, tokens = score.shape
    rows, device, inf = batch * heads, score.device, float("inf")
    budget = budgets.repeat(batch)[:, None]  # [R, 1]
    enters = torch.ones(rows, tokens, dtype=torch.bool, device=device) if valid is None else _per_head(valid, heads)
    # whether a head holds budget + buffer_size entries after a step is known beforehand: it only counts
    surplus = enters.cumsum(1) - budget
    due = enters & (surplus > 0) & (surplus % buffer_size == 0)  # [R, T]

    # one more column than tokens: nobody's position is `tokens`, and nobody is never evicted
    scores = torch.cat([score.reshape(rows, tokens), score.new_zeros(rows, 1)], dim=1)
    barred = torch.zeros_like(scores)
    barred[:, tokens] = inf
    if protected is not None:
        barred[:, :tokens].masked_fill_(_per_head(protected, heads), inf)

    nobody = torch.full((rows, 1), tokens, device=device)
    times = torch.full((rows, tokens + 1), tokens, device=device)
    width = largest_budget + buffer_size - 1  # held at most between two steps
    held = nobody
    for start in range(0, tokens, BLOCK):
        block = slice(start, min(start + BLOCK, tokens))
        fresh = torch.arange(block.start, block.stop, device=device).where(enters[:, block], tokens)
        positions = torch.cat([held, fresh], dim=1)  # [R, S]
        victims = _victims(
            scores.gather(1, positions),
            barred.gather(1, positions),
            (start - positions).float(),
            due[:, block],
            None if recent is None else recent.repeat(batch)[:, None],
            linear_in_age=linear_in_age,
            buffer_size=buffer_size,
        )  # [R, steps, buffer_size]
        first_unseen = torch.arange(block.start + 1, block.stop + 1, device=device)[None, :, None].expand_as(victims)
        times.scatter_(1, positions.gather(1, victims.flatten(1)), first_unseen.flatten(1))
        positions.scatter_(1, victims.flatten(1), tokens)
        held = torch.cat([nobody, positions.sort(dim=1).values[:, :width]], dim=1)
    return times[:, :tokens].masked_fill(~enters, 0).view(batch, heads, tokens)


def _victims(
    score: torch.Tensor,
    barred: torch.Tensor,
    age: torch.Tensor,
    due: torch.Tensor,
    recent: torch.Tensor | None,
    *,
    linear_in_age: bool,
    buffer_size: int,
) -> torch.Tensor:
    """Columns evicted at each of the n steps of a block, [R, n, buffer_size]; 0 where a head evicts none.

    Args:
        score, barred, age: [R, S], of which the last n columns are the new tokens; changed in place. `barred` is inf
            for entries that must stay; `age` is as of the block's first step.
        due: [R, n], the heads that evict at a step.
        recent: [R, 1] or None.
    """
    inf = float("inf")
    rows, steps = due.shape
    victims = torch.zeros(steps, rows, buffer_size, dtype=torch.int64, device=score.device)
    if not linear_in_age:
        barred.add_(score)  # the priority itself: it does not change with age
    priority = torch.empty_like(score)
    for step, (any_due, all_due) in enumerate(zip(due.any(0).tolist(), due.all(0).tolist(), strict=True)):
        if any_due:
            arrived = score.shape[1] - steps + step + 1
            candidates = barred[:, :arrived]
            if linear_in_age:
                candidates = torch.addcmul(candidates, age[:, :arrived], score[:, :arrived], out=priority[:, :arrived])
            if recent is not None:
                candidates = candidates.masked_fill(age[:, :arrived] < recent, inf)
            if buffer_size == 1:
                chosen = candidates.argmin(1, keepdim=True)
            else:
                chosen = candidates.sort(dim=1, stable=True).indices[:, :buffer_size]
            if not all_due:
                chosen = chosen.where(due[:, step, None], 0)
            barred.scatter_(1, chosen, inf)
            victims[step] = chosen
        if linear_in_age or recent is not None:
            age.add_(1)
    return victims.transpose(0, 1)


def _per_head(flags: torch.Tensor, heads: int) -> torch.Tensor:  # [B, T] -> [B * H, T]
    return flags.repeat_interleave(heads, dim=0)
