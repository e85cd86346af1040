"""Divides a layer's slots among programs, by the layout, the batch and the device only."""

from functools import cache
from itertools import accumulate, pairwise
from typing import NamedTuple

import torch
from triton import cdiv

from retention_gates.kernels.dispatch import multiprocessors

PROGRAMS = 4  # per multiprocessor: each costs a prologue and a partial result, and hides what others wait for
MOST_PARTS = 128  # of one head: all of them are summed by one program


class Parts(NamedTuple):
    """A division. The tensors are as kernels read them, and kept for good: a captured graph goes on reading them."""

    total: int  # P, parts of one row of the batch
    length: int  # slots of a part, but for the last one of a head
    size: int  # slots of every head, 0 where they differ
    per_head: int  # parts of every head, 0 where heads differ
    most: int  # parts of the head that has most
    table: (
        torch.Tensor
    )  # [P, 6] int32: head, its first slot, its slots, the part's first slot in it, count, first part
    head_parts: torch.Tensor  # [H, 2] int32: count, first part


def parts_of(head_offsets: tuple[int, ...], rows: int, block: int, device: torch.device, with_run: bool) -> Parts:
    """The division for `rows` programs per part (batch and blocks of queries) that read `block` slots at a time.

    Args:
        with_run: whether each head has one part more, for new tokens that are not in slots. It begins at its end.
    """
    largest = max(stop - start for start, stop in pairwise(head_offsets))
    least = cdiv(largest, MOST_PARTS - with_run)
    share = cdiv(head_offsets[-1] * rows, multiprocessors(device))  # slots of a multiprocessor
    length = max(cdiv(share, PROGRAMS), least)
    return _divided(head_offsets, cdiv(length, block) * block, device, with_run)


@cache
def _divided(head_offsets: tuple[int, ...], length: int, device: torch.device, with_run: bool) -> Parts:
    sizes = [stop - start for start, stop in pairwise(head_offsets)]
    counts = [cdiv(size, length) + with_run for size in sizes]
    firsts = list(accumulate(counts, initial=0))
    table = [
        [head, head_offsets[head], size, min(index * length, size)]
        for head, size in enumerate(sizes)
        for index in range(counts[head])
    ]
    is_uniform = len(set(sizes)) == 1
    with torch.inference_mode(False):
        tensors = (
            torch.tensor(rows, dtype=torch.int32, device=device)
            for rows in (table, [list(pair) for pair in zip(counts, firsts, strict=False)])
        )
    size, per_head = (sizes[0], counts[0]) if is_uniform else (0, 0)
    return Parts(firsts[-1], length, size, per_head, max(counts), *tensors)
