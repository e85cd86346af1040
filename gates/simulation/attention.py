"""Attention over a whole sequence of which most is evicted by the time that a query comes."""

import torch

from retention_gates.gates.attention.masked import masked_attention
from retention_gates.kernels.dispatch import use_fused
from retention_gates.kernels.retention_attention import retention_attention
from retention_gates.kernels.softmax import Softmax

QUERIES = 128  # per block: a block attends to what was held at its start and to its own tokens


def attention_until(
    times: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    most_held: int,
    softmax: Softmax,
) -> torch.Tensor:
    """Softmax attention of query t over the entries j <= t < times[j], [B, HQ, T, Dv] in query's dtype.

    A block of queries costs what it attends to, the entries held at its start and its own, however long the sequence.

    Args:
        times: int64 [B, H, T], the first step at which an entry is no longer seen.
        query: [B, HQ, T, D]; key: [B, H, T, D]; value: [B, H, T, Dv].
        most_held: entries that a head holds at most between two steps.
    """
    if use_fused("retention_attention", query):  # which skips blocks of keys that are evicted
        undecayed = torch.zeros(times.shape, device=times.device)
        return retention_attention(query, key, value, undecayed, eviction_times=times, **softmax._asdict())
    tokens = key.shape[2]
    outputs = []
    for start in range(0, tokens, QUERIES):
        block = slice(start, min(start + QUERIES, tokens))
        steps = torch.arange(block.start, block.stop, device=key.device)
        held = _held_at(times, start, min(most_held, start))  # [B, H, S]
        exists = held < start
        index = held.clamp(max=max(start - 1, 0))
        until = torch.cat([times.gather(2, index).masked_fill(~exists, 0), times[:, :, block]], dim=2)
        visible = steps[:, None] < until[:, :, None]  # [B, H, n, S + n]
        visible[..., held.shape[2] :] &= steps <= steps[:, None]
        output = masked_attention(
            query[:, :, block],
            torch.cat([_gather(key, index), key[:, :, block]], dim=2),
            torch.cat([_gather(value, index), value[:, :, block]], dim=2),
            visible,
            softmax,
        )
        outputs.append(output)
    return torch.cat(outputs, dim=2)


def _held_at(times: torch.Tensor, step: int, most: int) -> torch.Tensor:
    """Positions below `step` that are still seen at it, ascending, filled up with `step`; int64 [B, H, most]."""
    seen = times[:, :, :step] > step
    place = (seen.cumsum(2) - 1).where(seen, most)  # one place more than is given back takes all that are not
    positions = torch.arange(step, device=times.device).expand_as(place)
    return times.new_full((*times.shape[:2], most + 1), step).scatter_(2, place, positions)[..., :most]


def _gather(entries: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    return entries.gather(2, index[..., None].expand(-1, -1, -1, entries.shape[3]))
