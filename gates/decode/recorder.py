"""Runs a step once in a way that it can be repeated without Python, in a CUDA graph."""

import os
import shutil
import warnings
from collections.abc import Callable
from typing import Any, Protocol

import torch

from retention_gates.kernels.capture import capture, on_capture_stream

Step = Callable[[], Any]


class Recorder(Protocol):
    """Captures and replays steps on a device."""

    def warm_up(self, step: Step) -> tuple[Any, str | None]:
        """Runs the step as it is; its result, and what of it could not be captured, or None."""

    def capture(self, step: Step) -> tuple[Any, Callable[[], None]]:
        """Runs the step once; its result, and what runs it again, into the same tensors."""


class CudaRecorder:
    """Steps in a CUDA graph, with memory of its own that goes when the graph goes."""

    def __init__(self, device: torch.device):
        self.device = device

    def warm_up(self, step: Step) -> tuple[Any, str | None]:
        mode = torch.cuda.get_sync_debug_mode()
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")
            try:
                output = on_capture_stream(step, self.device)
            finally:
                torch.cuda.set_sync_debug_mode(mode)
        waits = [each for each in caught if "synchronizing CUDA operation" in str(each.message)]
        for other in caught:
            if other not in waits and "Synchronization debug mode" not in str(other.message):
                warnings.warn_explicit(other.message, other.category, other.filename, other.lineno)
        if not waits:
            return output, None
        return output, f"the model waits for the device ({waits[0].filename}, line {waits[0].lineno})"

    def capture(self, step: Step) -> tuple[Any, Callable[[], None]]:
        try:
            output, graph = capture(step, self.device)
        except RuntimeError as error:
            raise RuntimeError(
                f"This model's decoding step cannot be captured in a CUDA graph ({error}): pass graph=False to "
                "BoundedCache, and start the sequence again."
            ) from error
        with torch.cuda.device(self.device):
            graph.replay()
        return output, graph.replay


def check_compiler() -> None:
    """Raises ValueError if what torch.compile makes for a CPU cannot be built here."""
    names = [name for name in (os.environ.get("CXX"), "g++", "clang++") if name]
    if not any(shutil.which(name) for name in names):
        raise ValueError(
            f"compile=True on a CPU builds C++, and none of {', '.join(names)} is installed here: install g++, name "
            "another in the environment variable CXX, or leave compile=True out."
        )


RECORDERS: dict[str, Callable[[torch.device], Recorder]] = {"cuda": CudaRecorder}  # by the type of device
