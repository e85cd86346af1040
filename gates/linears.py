"""Linear layers of a recorded step that read the same tensor, computed together when the first of them is called.

Which ones do is seen, not known: one step is watched, and what got the same tensor then gets it at every step, because
a recorded step makes no choices. Outside of a recording every layer is called as ever.
"""

import threading
import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

import torch
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
        elif not torch.compiler.is_compiling() and (x is not self.read or len(self.outputs) != len(self.layers) - index):
            raise RuntimeError("The model's layers read other tensors than in the step before: pass graph=False.")
        return self.outputs.pop()


class Linears:
    """The groups of one model."""

    def __init__(self, groups: list[list[nn.Module]]):
        self.groups = [Group(layers) for layers in groups]
        # made once: for other functions a compiled step would be compiled again
        self.forwards = [
            (layer, _elsewhere(layer, partial(group.output, index))) for group in self.groups for index, layer in enumerate(group.layers)
        ]

    @contextmanager
    def together(self) -> Iterator[None]:
        """Inside of it, layers of a group are computed together."""
        with _replaced(self.forwards):
            try:
                yield
            finally:
                for group in self.groups:
                    group.read, group.outputs = None, []


class Watch:
    """The linear layers that a step calls, and what they read."""

    def __init__(self) -> None:
        self.calls: list[tuple[nn.Module, torch.Tensor]] = []

    @contextmanager
    def watching(self, model: nn.Module) -> Iterator[None]:
        # other classes, such as those with quantized weights, and layers with a forward of their own compute otherwise
        layers = [m for m in model.modules() if type(m) in (nn.Linear, GateLinear) and "forward" not in vars(m)]
        with _replaced([(layer, _elsewhere(layer, partial(self._note, layer))) for layer in layers]):
            yield

    def _note(self, layer: nn.Module, x: torch.Tensor) -> torch.Tensor:
        self.calls.append((layer, x))
        return type(layer).forward(layer, x)

    def found(self, model: nn.Module) -> Linears:
        """What the model's steps can compute together, the same object for the same layers."""
        times = Counter(layer for layer, _ in self.calls)
        groups: dict[int, list[nn.Module]] = {}
        for layer, x in self.calls:
            if times[layer] == 1 and _fits(layer, x):
                groups.setdefault(id(x), []).append(layer)  # every x is alive, so that no two share an id
        self.calls = []
        known = _known.get(model)
        if known is None or [group.layers for group in known.groups] != list(groups.values()):
            known = _known[model] = Linears(list(groups.values()))
        return known


_known: "weakref.WeakKeyDictionary[nn.Module, Linears]" = weakref.WeakKeyDictionary()
_lock = threading.RLock()
_here = threading.local()  # meanwhile, other threads may call the same layers


def _fits(layer: nn.Module, x: torch.Tensor) -> bool:
    """Whether the op takes the layer and what it reads."""
    if x.dtype not in (torch.float16, torch.bfloat16) or x.numel() > MOST_ROWS * x.shape[-1]:
        return False
    return layer.weight.dtype in (x.dtype, torch.float32) and use_fused("few_row_linear", x)


def _elsewhere(layer: nn.Module, function: Forward) -> Forward:
    """`function` in the thread that replaces the layer's forward, and the forward itself in others."""

    def forward(x: torch.Tensor) -> torch.Tensor:
        if torch.compiler.is_compiling() or getattr(_here, "replaces", False):
            return function(x)
        return type(layer).forward(layer, x)

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
