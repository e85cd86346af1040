"""Captures GPU work in a CUDA graph, which replays it without Python."""

from collections.abc import Callable
from functools import cache
from typing import TypeVar

import torch

T = TypeVar("T")


@cache
def capture_stream(device: torch.device) -> torch.cuda.Stream:
    """The stream on which all work of a device is captured; what is to be captured warms up on it."""
    return torch.cuda.Stream(device)


def on_capture_stream(run: Callable[[], T], device: torch.device) -> T:
    """Runs work on the stream that captures, so that libraries have their workspaces there before it does."""
    with torch.cuda.device(device):
        current, side = torch.cuda.current_stream(), capture_stream(device)
        side.wait_stream(current)
        with torch.cuda.stream(side):
            result = run()
        current.wait_stream(side)
    return result


def capture(run: Callable[[], T], device: torch.device) -> tuple[T, torch.cuda.CUDAGraph]:
    """Captures `run` in a graph with memory of its own, which goes when the graph goes.

    Nothing runs yet: what `run` returns is filled by `graph.replay()`. Other threads go on allocating meanwhile.

    Raises:
        RuntimeError: if `run` waits for the device or does anything else that a graph cannot hold.
    """
    graph = torch.cuda.CUDAGraph()
    with (
        torch.cuda.device(device),
        torch.cuda.graph(graph, stream=capture_stream(device), capture_error_mode="thread_local"),
    ):
        result = run()
    return result, graph
