"""A training step's forward and backward pass as one CUDA graph."""

from collections.abc import Callable, Sequence

import torch
from torch import nn

from retention_gates import compat
from retention_gates.kernels.capture import capture

Batch = dict[str, torch.Tensor]
Objective = Callable[[Batch], tuple[torch.Tensor, Batch]]  # batch -> loss and terms, fp32 scalars

WARM_UP_STEPS = 3  # run as they are first, so that kernels are compiled and libraries hold their workspaces


class StepGraph:
    """Captures an objective and its gradients for one shape of batch; a replay is one launch for the host.

    A small model's step is thousands of launches, which take the host far longer than the GPU takes to run them.
    Capture runs nothing. Values are not looked at inside, so that what an op would refuse must be refused before.

    Args:
        objective: from tensors on the GPU, at fixed addresses from then on.
        batch: of the shapes to capture; copied.
        parameters: what gradients are wanted of; all of them must reach the loss.
    """

    def __init__(self, objective: Objective, batch: Batch, parameters: Sequence[nn.Parameter]):
        self._parameters = list(parameters)
        self._batch = {name: tensor.clone() for name, tensor in batch.items()}
        device = next(iter(self._batch.values())).device
        (self._gradients, self._numbers, self._names), self._graph = capture(lambda: self._step(objective), device)

    def _step(self, objective: Objective) -> tuple[tuple[torch.Tensor, ...], torch.Tensor, list[str]]:
        """Gradients, loss and terms in one tensor, and the names of the terms."""
        loss, terms = objective(self._batch)
        gradients = torch.autograd.grad(loss, self._parameters)
        return gradients, torch.stack([loss.detach(), *terms.values()]), list(terms)

    def fits(self, batch: Batch) -> bool:
        """Whether the graph was captured for batches like this one."""
        return {k: (v.shape, v.dtype) for k, v in batch.items()} == {
            k: (v.shape, v.dtype) for k, v in self._batch.items()
        }

    def run(self, batch: Batch, share: float = 1.0) -> tuple[torch.Tensor, Batch]:
        """Loss and terms of a batch; `share` of its gradients is added to those of the parameters."""
        for name, tensor in self._batch.items():
            tensor.copy_(batch[name], non_blocking=True)
        self._graph.replay()
        gradients = compat.foreach_mul(self._gradients, share)  # new memory: the next replay overwrites the old
        for parameter, gradient in zip(self._parameters, gradients, strict=True):
            parameter.grad = gradient if parameter.grad is None else parameter.grad.add_(gradient)
        loss, *terms = self._numbers.clone().unbind()
        return loss, dict(zip(self._names, terms, strict=True))
