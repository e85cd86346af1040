"""Checks in Triton's interpreter that kernels read and write only where the tensors lie that they are given.

What compute-sanitizer's memcheck looks for on a GPU, and more closely: a pointer is outside as soon as it leaves the
tensor, whatever memory comes after it.
"""

import os
from collections.abc import Iterator
from functools import wraps
from importlib.util import find_spec
from typing import Any

import numpy as np
import torch


class Bounds:
    """Where the tensors of the kernel lie that runs."""

    def __init__(self) -> None:
        self.begins = self.ends = np.empty(0, np.uint64)

    def take(self, arguments: Any) -> None:
        spans: list[list[int]] = []
        for begin, end in sorted(_span(tensor) for tensor in _tensors(arguments) if tensor.numel()):
            if spans and begin < spans[-1][1]:  # views of one tensor
                spans[-1][1] = max(end, spans[-1][1])
            else:
                spans.append([begin, end])
        self.begins, self.ends = np.array(spans, np.uint64).reshape(-1, 2).T

    def check(self, what: str, pointers: Any, mask: Any = None) -> None:
        size = max(1, pointers.get_element_ty().primitive_bitwidth // 8)
        asked, held = np.asarray(pointers.data), True if mask is None else mask
        if mask is not None and not isinstance(mask, np.ndarray):  # before Triton 3.9, a descriptor's is an array
            # A scalar comparison joined with a block's leaves integers, which Triton 3.9's interpreter refuses.
            held = mask.data = np.asarray(mask.data).astype(bool, copy=False)
        asked = asked[np.broadcast_to(held, asked.shape)].astype(np.uint64)
        place = np.searchsorted(self.begins, asked, "right") - 1
        is_inside = place >= 0
        is_inside[is_inside] = asked[is_inside] + np.uint64(size) <= self.ends[place[is_inside]]
        if not is_inside.all():
            raise IndexError(f"{(~is_inside).sum()} of {asked.size} numbers {what} outside of the kernel's tensors")


def _tensors(arguments: Any) -> Iterator[torch.Tensor]:
    if isinstance(arguments, dict):
        arguments = tuple(arguments.values())
    if isinstance(arguments, tuple | list):
        for each in arguments:
            yield from _tensors(each)
    elif isinstance(arguments, torch.Tensor):
        yield arguments
    elif hasattr(arguments, "base"):  # tensor descriptors and reinterpreted tensors
        yield from _tensors(arguments.base)


def _span(tensor: torch.Tensor) -> tuple[int, int]:
    """The first byte and the one after the last."""
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return tensor.data_ptr(), tensor.data_ptr() + (last + 1) * tensor.element_size()


def watch_interpreter() -> None:
    """From now on, a kernel that leaves its tensors fails; where kernels are interpreted."""
    if os.environ.get("TRITON_INTERPRET") != "1" or find_spec("triton") is None:
        return
    from triton.runtime.interpreter import GridExecutor, InterpreterBuilder

    bounds = Bounds()

    def before(owner: Any, name: str, look: Any) -> None:
        function = getattr(owner, name)

        @wraps(function)
        def looked_at(self: Any, *arguments: Any, **options: Any) -> Any:
            look(*arguments)
            return function(self, *arguments, **options)

        setattr(owner, name, looked_at)

    before(InterpreterBuilder, "create_masked_load", lambda p, mask, *_: bounds.check("read", p, mask))
    before(InterpreterBuilder, "create_masked_store", lambda p, _, mask, *__: bounds.check("written", p, mask))
    before(InterpreterBuilder, "create_atomic_rmw", lambda _, p, __, mask, *___: bounds.check("changed", p, mask))
    before(InterpreterBuilder, "create_atomic_cas", lambda p, *_: bounds.check("changed", p))
    to_host = GridExecutor._init_args_hst

    @wraps(to_host)
    def noted(self: Any, *arguments: Any) -> Any:
        found = to_host(self, *arguments)
        bounds.take(found)
        return found

    GridExecutor._init_args_hst = noted
