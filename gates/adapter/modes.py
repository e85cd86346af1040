"""States of a model that are changed for a while and put back, whatever happens meanwhile."""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from retention_gates.gates.adapter.config import RetentionGateConfig


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Inside the block the model is in evaluation mode; afterwards each module is in the mode that it was in."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


@contextmanager
def budget_shares(config: RetentionGateConfig, shares: list[list[float]] | None) -> Iterator[None]:
    """Inside the block the adapter has these shares, which calibrated budgets follow; afterwards its own."""
    before, config.budget_shares = config.budget_shares, shares
    try:
        yield
    finally:
        config.budget_shares = before
