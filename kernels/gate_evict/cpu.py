"""Eviction in place on a CPU, where looking at numbers costs nothing: the steps of a full memory in few operators."""

from typing import Any

import torch

from retention_gates.kernels.gate_evict import naive
from retention_gates.kernels.gate_evict.layout import SlotState, SlotTable, slot_table


def gate_evict(
    state: SlotState,
    new_key: torch.Tensor,
    new_value: torch.Tensor,
    new_score: torch.Tensor | None,
    head_offsets: tuple[int, ...],
    **rule: Any,
) -> None:
    """Arguments and effect as in `naive.gate_evict`, to the bit.

    A head whose last step marked a victim is full and stays so: the token takes the victim's slot, no slot is empty,
    and there is a victim again. Where not every head is like that, or the token is protected or may be padding,
    naive.py runs.
    """
    keys, values, score, positions, pending, start, seen = state
    victims = pending.nonzero(as_tuple=True)  # rows and slots, one of each head
    heads = new_key.shape[0] * new_key.shape[1]
    if len(victims[0]) != heads or not _is_simple(int(seen), start, **rule):
        naive.gate_evict(state, new_key, new_value, new_score, head_offsets, **rule)
        return
    if new_score is None:
        new_score = naive.finished(rule["gate_hidden"], rule["gate_weight"], rule["gate_bias"])
    keys.index_put_(victims, new_key.flatten(0, 2))
    values.index_put_(victims, new_value.flatten(0, 2))
    score.index_put_(victims, new_score.flatten())
    positions.index_put_(victims, seen)
    table = slot_table(head_offsets, keys.device)
    priority = (seen - positions) * score if rule["linear_in_age"] else score
    torch.eq(priority, _least(priority, table), out=pending)
    if int(pending.count_nonzero()) != heads:  # of equal ones the lowest position goes
        tied = positions.masked_fill(~pending, torch.iinfo(positions.dtype).max)
        torch.eq(tied, _least(tied, table), out=pending)
    seen += 1


def _is_simple(
    step: int,
    start: torch.Tensor,
    *,
    buffer_size: int = 1,
    recent: torch.Tensor | None = None,
    protected: torch.Tensor | None = None,
    padding_mask: torch.Tensor | None = None,
    **_: Any,
) -> bool:
    if buffer_size != 1 or recent is not None or padding_mask is not None:
        return False
    spans = [] if protected is None else protected.tolist()
    return not any(first <= step - begin < last for first, last in spans for begin in start.tolist())


def _least(row: torch.Tensor, table: SlotTable) -> torch.Tensor:
    """The least number of each slot's head, [B, N]; the lines of shorter heads repeat a slot of theirs."""
    return table.by_head(row).amin(2).index_select(1, table.head)
