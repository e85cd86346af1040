"""Layers of a recorded step in 16 bits, computed in fewer launches.

Linear layers that read the same tensor are computed together when the first of them is called, RMS norms by torch's
kernel for them. Which layers are that is seen, not known: one step is watched, and what it saw holds at every step,
because a recorded step makes no choices. Outside of a recording every layer is called as ever.
"""

import threading
import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from retention_gates.gates.gate import GateLinear
from retention_gates.kernels.dispatch import use_fused
from retention_gates.kernels.few_row_linear import MOST_ROWS, few_row_linear

Forward = Callable[[torch.Tensor], torch.Tensor]


class Group:
    """Layers that read the same tensor, in the order in which they are called."""

    def __init__(self, layers: list[nn.Module]):
        self.layers = layers
        self.read: torch.Tensor | None = None
        self.outputs: list[torch.Tensor] = []  # of the layers that have not been called yet, the next one last

    def output(self, index: int, x: torch.Tensor) -> torch.Tensor:
        if index == 0:
            weights, biases = ([getattr(layer, name) for layer in self.layers] for name in ("weight", "bias"))
            self.read, self.outputs = x, few_row_linear(x, weights, biases)[::-1]
        elif not torch.compiler.is_compiling() and (
            x is not self.read or len(self.outputs) != len(self.layers) - index
        ):
            raise RuntimeError("The model's layers read other tensors than in the step before: pass graph=False.")
        return self.outputs.pop()


class StepLayers:
    """What of one model's steps is computed otherwise while they are recorded."""

    def __init__(self, groups: list[list[nn.Module]], norms: list[nn.Module]):
        self.groups, self.norms = [Group(layers) for layers in groups], norms
        # made once: for other functions a compiled step would be compiled again
        self.forwards = [
            (layer, _elsewhere(layer, partial(group.output, index)))
            for group in self.groups
            for index, layer in enumerate(group.layers)
        ]
        self.forwards += [(norm, _elsewhere(norm, partial(_rms_norm, norm))) for norm in norms]

    def __bool__(self) -> bool:
        return bool(self.forwards)

    @contextmanager
    def replaced(self) -> Iterator[None]:
        """Inside of it, they are."""
        with _replaced(self.forwards):
            try:
                yield
            finally:
                for group in self.groups:
                    group.read, group.outputs = None, []


class Watch:
    """The layers that a step calls, and what they read and give."""

    def __init__(self) -> None:
        self.times: Counter[nn.Module] = Counter()
        self.calls: list[tuple[nn.Module, torch.Tensor, torch.Tensor]] = []  # of what can be computed otherwise

    @contextmanager
    def watching(self, model: nn.Module) -> Iterator[None]:
        # quantized layers are of other classes; layers with a forward of their own compute otherwise
        layers = [m for m in model.modules() if (_is_linear(m) or _may_be_norm(m)) and "forward" not in vars(m)]
        with _replaced([(layer, _elsewhere(layer, partial(self._note, layer))) for layer in layers]):
            yield

    def _note(self, layer: nn.Module, x: torch.Tensor) -> torch.Tensor:
        output = type(layer).forward(layer, x)
        self.times[layer] += 1
        if _fits(layer, x):
            self.calls.append((layer, x, output))
        return output

    def found(self, model: nn.Module) -> StepLayers:
        """What was seen; the same object for the same layers."""
        groups: dict[int, list[nn.Module]] = {}
        norms = []
        for layer, x, output in self.calls:
            if self.times[layer] > 1:
                continue
            if _is_linear(layer):
                groups.setdefault(id(x), []).append(layer)  # every x is alive, so that no two share an id
            elif _same(_rms_norm(layer, x), output):
                norms.append(layer)
        self.calls = []
        known = _known.get(model)
        if known is None or [each.layers for each in known.groups] != list(groups.values()) or known.norms != norms:
            known = _known[model] = StepLayers(list(groups.values()), norms)
        return known


_known: "weakref.WeakKeyDictionary[nn.Module, StepLayers]" = weakref.WeakKeyDictionary()
_lock = threading.RLock()
_here = threading.local()  # meanwhile, other threads may call the same layers


def _is_linear(module: nn.Module) -> bool:
    return type(module) in (nn.Linear, GateLinear)


def _may_be_norm(module: Any) -> bool:
    names = [name for name, _ in module.named_parameters()]
    return names == ["weight"] and module.weight.ndim == 1 and _epsilon(module) is not None


def _epsilon(module: nn.Module) -> float | None:
    return next((getattr(module, name) for name in ("variance_epsilon", "eps") if hasattr(module, name)), None)


def _rms_norm(norm: Any, x: torch.Tensor) -> torch.Tensor:
    return F.rms_norm(x, norm.weight.shape, norm.weight, _epsilon(norm))


def _same(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Up to two roundings: of the normalised numbers, which some models round before they weigh them."""
    if one.shape != other.shape or one.dtype != other.dtype:
        return False
    return torch.allclose(one, other, rtol=2 * torch.finfo(one.dtype).eps, atol=1e-6)


def _fits(layer: nn.Module, x: torch.Tensor) -> bool:
    """Whether the op takes the layer and what it reads: of a norm, torch's."""
    if x.dtype not in (torch.float16, torch.bfloat16) or x.numel() > MOST_ROWS * x.shape[-1]:
        return False
    return layer.weight.dtype in (x.dtype, torch.float32) and use_fused("few_row_linear", x)


def _elsewhere(layer: nn.Module, function: Forward) -> Forward:
    """`function` in the thread that replaces the layer's forward, and the forward itself in others."""

    def forward(x: torch.Tensor, *more: Any, **options: Any) -> torch.Tensor:
        is_here = torch.compiler.is_compiling() or getattr(_here, "replaces", False)
        if is_here and not more and not options:  # a norm of two tensors is another kind
            return function(x)
        return type(layer).forward(layer, x, *more, **options)

    return forward


@contextmanager
def _replaced(forwards: list[tuple[nn.Module, Forward]]) -> Iterator[None]:
    with _lock:
        for layer, forward in forwards:
            layer.__dict__["forward"] = forward
        _here.replaces = True
        try:
            yield
        finally:
            _here.replaces = False
            for layer, _ in forwards:
                del layer.__dict__["forward"]
