"""Lets the forward passes that `generate` makes ask the cache's captured step first."""

import threading
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Any

from torch import nn

from retention_gates.gates.attention.cache_argument import find_cache

_patched: "weakref.WeakKeyDictionary[nn.Module, int]" = weakref.WeakKeyDictionary()


_lock = threading.Lock()


@contextmanager
def replaced_forward(model: nn.Module) -> Iterator[None]:
    """Inside the block, every forward pass of the model first goes through the step of the cache that it gets."""
    with _lock:
        _patched[model] = _patched.get(model, 0) + 1
        if _patched[model] == 1:
            before = model.__dict__.get("forward")  # accelerate sets one
            forward = model.forward

            @wraps(forward)
            def step_or_forward(*args: Any, **kwargs: Any) -> Any:
                step = getattr(find_cache(kwargs), "decode_step", None)
                if args or step is None or not step.is_open:
                    return forward(*args, **kwargs)
                return step.run(forward, kwargs)

            step_or_forward.before = before  # type: ignore[attr-defined]
            model.forward = step_or_forward
    try:
        yield
    finally:
        with _lock:
            _patched[model] -= 1
            if not _patched[model]:
                before = model.__dict__.pop("forward").before
                if before is not None:
                    model.forward = before


def forward_of(model: Any) -> Any:
    """The model's own forward pass, also while it is replaced."""
    with _lock:
        forward = model.forward
        return forward.__wrapped__ if _patched.get(model) else forward
