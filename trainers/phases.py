"""Where the time of a run goes, and what memory it takes."""

import resource
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch

TIME, MEMORY = "time/", "memory/"


class PhaseClock:
    """Seconds of wall-clock time in named phases since the clock was made; what is in none of them is "other".

    Work that is queued on a GPU counts for the phase that waits for it.
    """

    def __init__(self) -> None:
        self._began = time.monotonic()
        self._seconds: dict[str, float] = {}
        self._running: str | None = None

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Counts the block's time; a phase inside another counts for the outer one."""
        if self._running is not None:
            yield
            return
        self._running, began = name, time.monotonic()
        try:
            yield
        finally:
            self._running = None
            self._seconds[name] = self._seconds.get(name, 0.0) + time.monotonic() - began

    def shares(self) -> dict[str, float]:
        """`time/NAME` of each phase so far, which add up to 1."""
        whole = max(time.monotonic() - self._began, 1e-9)
        shares = {TIME + name: seconds / whole for name, seconds in self._seconds.items()}
        return shares | {TIME + "other": max(0.0, 1.0 - sum(shares.values()))}


def peak_memory(device: torch.device) -> dict[str, float]:
    """The most that was allocated so far, in GiB: on the GPU, or by the process where there is none."""
    if device.type == "cuda":
        return {MEMORY + "gpu_peak_gib": torch.cuda.max_memory_allocated(device) / 2**30}
    unit = 1 if sys.platform == "darwin" else 1024  # of ru_maxrss, in bytes
    return {MEMORY + "process_peak_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30}
