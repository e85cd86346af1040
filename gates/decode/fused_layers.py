"""Layers of a captured step in 16 bits, computed in fewer launches.

Linear layers that read the same tensor are computed together, RMS norms are one kernel each, and queries and keys are
rotated by one. What the model does with their results next may join these launches (`deferred.py`). Which layers that
are is seen, not known: one step is watched, and what it saw holds at every step, because a captured step makes no
choices. Outside of a capture layers are called as ever.
"""

import threading
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial, wraps
from types import ModuleType
from typing import Any

import torch
from torch import nn

from retention_gates.gates.adapter.gate import GateLinear
from retention_gates.gates.decode.deferred import Deferring, Products, settled, split_norm
from retention_gates.kernels.rms_norm import naive, rms_norm
from retention_gates.kernels.rotary import rotary

Forward = Callable[[torch.Tensor], torch.Tensor]


RotaryFunction = Callable[..., Any]


ROTARY = "apply_rotary_pos_emb"  # the function's name in transformers' modelling files


class Group:
    """Layers that read the same tensor, in the order in which they are called."""

    def __init__(self, layers: list[nn.Module]):
        self.layers = layers
        self.products: Products | None = None  # of the step that runs

    def output(self, index: int, x: torch.Tensor) -> torch.Tensor:
        x = settled(x)
        if index == 0:
            self.products = Products(self.layers, x)
        elif self.products is None or (not torch.compiler.is_compiling() and x is not self.products.x):
            raise RuntimeError("The model's layers read other tensors than in the step before: pass graph=False.")
        if torch.compiler.is_compiling() or self.products.results:
            return self.products.result(index)
        deferring = getattr(_here, "deferring", None)  # not where a compiler leaves a part to Python
        if deferring is None or self.layers[index] not in deferring.layers:
            return self.products.result(index)
        return deferring.product(self.products, index)


class FusedLayers:
    """The layers of one model's steps that are computed in another way while they are captured."""

    def __init__(
        self,
        groups: list[list[nn.Module]],
        norms: list[nn.Module],
        rotating: Sequence[ModuleType] = (),
        deferred: Collection[nn.Module] = (),
    ):
        self.parts = (groups, norms, rotating, deferred)
        self.groups, self.norms = [Group(layers) for layers in groups], norms
        self.deferred = set(deferred)  # layers whose readers are known to join them
        # made once: for other functions a compiled step would be compiled again
        self.forwards = [
            (layer, in_this_thread(layer, partial(group.output, index)))
            for group in self.groups
            for index, layer in enumerate(group.layers)
        ]
        self.norm_forwards = {
            is_compiled: [(norm, in_this_thread(norm, partial(form, norm))) for norm in norms]
            for is_compiled, form in ((False, _norm_or_deferred), (True, partial(norm_by, naive.rms_norm)))
        }
        self.rotating = list(rotating)

    def __bool__(self) -> bool:
        return bool(self.forwards or self.norms or self.rotating)

    @contextmanager
    def replaced(self, is_compiled: bool = False) -> Iterator[None]:
        """Inside of it, they are. A compiler makes one kernel of norms, rotating and what is around them."""
        rotations = (
            {}
            if is_compiled
            else {module: rotary_in_this_thread(getattr(module, ROTARY), rotate_by_op) for module in self.rotating}
        )
        with (
            replaced_forwards([*self.forwards, *self.norm_forwards[is_compiled]], rotations),
            nullcontext() if is_compiled else _deferring(self.deferred),
        ):
            try:
                yield
            finally:
                for group in self.groups:
                    group.products = None


_lock = threading.RLock()


_here = threading.local()  # meanwhile, other threads may call the same layers


def is_linear(module: nn.Module) -> bool:
    return type(module) in (nn.Linear, GateLinear)


def may_be_norm(module: Any) -> bool:
    names = [name for name, _ in module.named_parameters()]
    return names == ["weight"] and module.weight.ndim == 1 and _epsilon(module) is not None


def _epsilon(module: Any) -> Any:
    return next((getattr(module, name) for name in ("variance_epsilon", "eps") if hasattr(module, name)), None)


def norm_by(form: Callable[..., torch.Tensor], norm: Any, x: torch.Tensor) -> torch.Tensor:
    return form(x, norm.weight, _epsilon(norm))


def _norm_or_deferred(norm: Any, x: torch.Tensor) -> torch.Tensor:
    deferring = _here.deferring
    return norm_by(deferring.norm if norm in deferring.layers else rms_norm, norm, settled(x))


def rotate_by_op(
    query: torch.Tensor, key: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
) -> tuple[torch.Tensor, ...]:
    (query, query_norm), (key, key_norm) = split_norm(query), split_norm(key)
    angles = (x.expand(len(query), -1, -1) for x in (cos, sin))
    return rotary(query, key, *angles, query_norm=query_norm, key_norm=key_norm)


def rotary_in_this_thread(rotation: RotaryFunction, function: RotaryFunction) -> RotaryFunction:
    """As `in_this_thread`, for a function of a modelling file."""

    @wraps(rotation)
    def rotate(*tensors: Any, **options: Any) -> Any:
        if getattr(_here, "replaces", False) and len(tensors) == 4 and not options:
            return function(*tensors)
        return rotation(*tensors, **options)

    return rotate


def in_this_thread(layer: nn.Module, function: Forward) -> Forward:
    """`function` in the thread that replaces the layer's forward, and the forward itself in others."""

    def forward(x: torch.Tensor, *more: Any, **options: Any) -> torch.Tensor:
        is_here = torch.compiler.is_compiling() or getattr(_here, "replaces", False)
        if is_here and not more and not options:  # a norm of two tensors is another kind
            return function(x)
        return type(layer).forward(layer, x, *more, **options)

    return forward


@contextmanager
def _deferring(layers: Collection[nn.Module]) -> Iterator[None]:
    with Deferring(layers) as _here.deferring:
        try:
            yield
        finally:
            _here.deferring = None


@contextmanager
def replaced_forwards(
    forwards: list[tuple[nn.Module, Forward]], rotations: Mapping[ModuleType, RotaryFunction]
) -> Iterator[None]:
    with _lock:
        before = {module: getattr(module, ROTARY) for module in rotations}
        own = [(layer, vars(layer).get("forward")) for layer, _ in forwards]  # Accelerate gives layers one
        for layer, forward in forwards:
            layer.__dict__["forward"] = forward
        for module, rotation in rotations.items():
            setattr(module, ROTARY, rotation)
        _here.replaces = True
        try:
            yield
        finally:
            _here.replaces = False
            for module, rotation in before.items():
                setattr(module, ROTARY, rotation)
            for layer, its_own in own:
                if its_own is None:
                    del layer.__dict__["forward"]
                else:
                    layer.__dict__["forward"] = its_own
