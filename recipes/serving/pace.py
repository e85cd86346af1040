"""Chooses how much of a prompt is read between two steps, by how long running chats may pause."""

import time

from retention_gates.recipes.serving.rows import ChatRows

LEAST, LARGEST = 16, 4096  # tokens of a chunk
SHARE = 0.8  # of the pause that what is measured may take; the rest is for what else happens between two steps
TRIALS = 3


def fitting_chunk(rows: ChatRows, pause: float) -> int:
    """The largest chunk of a prompt that is read, with a step of all rows, in so many seconds.

    It is measured once, over a full memory, and then kept: chunks that changed with the load would change what chats
    say. What a chunk costs does not depend on where in a prompt it stands.

    Raises:
        ValueError: if the smallest chunk takes longer.
    """
    rows.read([0] * LARGEST, 0)
    fitting, size, took = 0, LEAST, seconds_of(rows, LEAST)
    while took <= SHARE * pause:
        fitting = size
        if size == LARGEST:
            break
        size *= 2
        took = seconds_of(rows, size)
    rows.reset()
    if not fitting:
        raise ValueError(
            f"--max-pause-ms {1e3 * pause:g}: a step and {LEAST} tokens of a prompt take {1e3 * took:.3g} ms here, so "
            f"that at least {1e3 * took / SHARE:.3g} ms are needed."
        )
    return fitting


def seconds_of(rows: ChatRows, size: int) -> float:
    """The longest of some steps of all rows, each with a chunk of so many tokens; the first is not counted."""
    count, times = rows.counts[-1], []
    for _ in range(TRIALS + 1):
        began = time.perf_counter()
        stepped = rows.step([0] * count, [0] * count)
        (stepped.max() + rows.read([0] * size, 1).max()).item()  # waits for the device
        times.append(time.perf_counter() - began)
    return max(times[1:])
