"""States that hold inside a block and are put back when it ends, whatever happens meanwhile."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn


@contextmanager
def temporarily(holders: Iterable[Any], **values: Any) -> Iterator[None]:
    """Inside the block these attributes of all holders have these values; afterwards each holder has its own again."""
    before = [(holder, name, getattr(holder, name)) for holder in holders for name in values]
    done = []
    try:
        for holder, name, own in before:
            setattr(holder, name, values[name])
            done.append((holder, name, own))
        yield
    finally:
        for holder, name, own in reversed(done):
            setattr(holder, name, own)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Inside the block the model is in evaluation mode; afterwards each module is in the mode that it was in."""
    before = [(module, module.training) for module in model.modules()]
    try:
        model.eval()
        yield
    finally:
        for module, was_training in before:
            if module.training != was_training:  # what has not changed is not written, for other threads' sake
                module.training = was_training
