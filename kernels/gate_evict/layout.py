"""The ragged row of a layer's slots: head h owns the slots from head_offsets[h] to head_offsets[h + 1]."""

from functools import cache, lru_cache
from itertools import pairwise
from typing import NamedTuple

import torch


class SlotState(NamedTuple):
    """The contents of a layer's slots; ops change these tensors in place."""

    keys: torch.Tensor  # [B, N, D]
    values: torch.Tensor  # [B, N, Dv]
    score: torch.Tensor  # fp32 [B, N], inf for protected entries
    positions: torch.Tensor  # int64 [B, N], -1 for an empty slot
    pending: torch.Tensor  # bool [B, N], entries that are evicted and will be overwritten next
    start: torch.Tensor  # int64 [B], the position of each row's first real token
    seen: torch.Tensor  # int64 [], tokens so far, padding included; at most 2^40


class SlotTable(NamedTuple):
    """Ways between the ragged row [N] and one line per head, padded to the longest, [H, S]."""

    slot: torch.Tensor  # [H, S] int64, where in the row a head's s-th slot lies, or its first if it has fewer
    exists: torch.Tensor  # [H, S] bool
    cell: torch.Tensor  # [N] int64, where in the flattened [H * S] a slot lies
    head: torch.Tensor  # [N] int64, the KV head that a slot belongs to
    sizes: torch.Tensor  # [H] int64, slots of a head
    is_even: bool  # whether all heads have the same number, so that both ways are views

    def by_head(self, row: torch.Tensor) -> torch.Tensor:  # [B, N, ...] -> [B, H, S, ...]
        """To be read only: it may be the row itself."""
        return row.unflatten(1, self.slot.shape) if self.is_even else row[:, self.slot]

    def held(self, positions: torch.Tensor) -> torch.Tensor:  # [B, N] -> [B, H, S], -1 where there is no slot
        """To be read only."""
        by_head = self.by_head(positions)
        return by_head if self.is_even else by_head.masked_fill(~self.exists, -1)

    def ragged(self, by_head: torch.Tensor) -> torch.Tensor:  # [B, H, S, ...] -> [B, N, ...]
        """To be read only."""
        row = by_head.flatten(1, 2)
        return row if self.is_even else row[:, self.cell]


def slot_table(head_offsets: tuple[int, ...], device: torch.device) -> SlotTable:
    """The table of a layout. It is kept, as a layer asks for it at every step, but not where it is traced."""
    if not torch.compiler.is_compiling():
        return _kept(head_offsets, device)
    return (_made if device.type == "cpu" else _untraced)(head_offsets, device)


def _made(head_offsets: tuple[int, ...], device: torch.device) -> SlotTable:
    sizes = [stop - start for start, stop in pairwise(head_offsets)]
    longest, heads = max(sizes), range(len(sizes))

    def tensor(numbers: list) -> torch.Tensor:
        return torch.tensor(numbers, device=device)

    return SlotTable(
        tensor([[head_offsets[h] + (s if s < sizes[h] else 0) for s in range(longest)] for h in heads]),
        tensor([[s < sizes[h] for s in range(longest)] for h in heads]),
        tensor([h * longest + s for h in heads for s in range(sizes[h])]),
        tensor([h for h in heads for _ in range(sizes[h])]),
        tensor(sizes),
        len(set(sizes)) == 1,
    )


_kept = lru_cache(maxsize=256)(_made)


@torch.compiler.disable
def _untraced(head_offsets: tuple[int, ...], device: torch.device) -> SlotTable:
    """On a GPU, to which no compiled step should copy the numbers each time."""
    return _kept(head_offsets, device)


class DeviceOffsets(NamedTuple):
    """A layout as kernels read it."""

    offsets: torch.Tensor  # [H + 1] int32
    size: int  # slots of every head, 0 where they differ
    largest: int  # slots of the longest head


@cache
def device_offsets(head_offsets: tuple[int, ...], device: torch.device) -> DeviceOffsets:
    """Where the heads lie, for kernels. Kept for good: a captured graph reads the tensor for as long as it lives."""
    sizes = [stop - start for start, stop in pairwise(head_offsets)]
    with torch.inference_mode(False):
        offsets = torch.tensor(head_offsets, dtype=torch.int32, device=device)
    return DeviceOffsets(offsets, sizes[0] if len(set(sizes)) == 1 else 0, max(sizes))
