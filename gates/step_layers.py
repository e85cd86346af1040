"""Layers of a recorded step in 16 bits, computed in fewer launches.

Linear layers that read the same tensor are computed together, RMS norms are one kernel each, and queries and keys are
turned by one. What the model does with their results next may join these launches (`deferred.py`). Which layers that
are is seen, not known: one step is watched, and what it saw holds at every step, because a recorded step makes no
choices. Outside of a recording layers are called as ever.
"""

import sys
import threading
import weakref
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial, wraps
from types import ModuleType
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from retention_gates.gates.deferred import AFTER_NORMS, AFTER_PRODUCTS, Deferring, Products, settled, split_norm
from retention_gates.gates.gate import GateLinear
from retention_gates.kernels.dispatch import use_fused
from retention_gates.kernels.few_row_linear import MOST_ROWS
from retention_gates.kernels.rms_norm import LARGEST_WIDTH, naive, rms_norm
from retention_gates.kernels.rotary import rotary

Forward = Callable[[torch.Tensor], torch.Tensor]
Turn = Callable[..., Any]
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


class StepLayers:
    """What of one model's steps is computed otherwise while they are recorded."""

    def __init__(
        self,
        groups: list[list[nn.Module]],
        norms: list[nn.Module],
        turning: Sequence[ModuleType] = (),
        deferred: Collection[nn.Module] = (),
    ):
        self.parts = (groups, norms, turning, deferred)
        self.groups, self.norms = [Group(layers) for layers in groups], norms
        self.deferred = set(deferred)  # layers whose readers are known to join them
        # made once: for other functions a compiled step would be compiled again
        self.forwards = [
            (layer, _elsewhere(layer, partial(group.output, index)))
            for group in self.groups
            for index, layer in enumerate(group.layers)
        ]
        self.norm_forwards = {
            is_compiled: [(norm, _elsewhere(norm, partial(form, norm))) for norm in norms]
            for is_compiled, form in ((False, _norm_or_deferred), (True, partial(_norm, naive.rms_norm)))
        }
        self.turning = list(turning)

    def __bool__(self) -> bool:
        return bool(self.forwards or self.norms or self.turning)

    @contextmanager
    def replaced(self, is_compiled: bool = False) -> Iterator[None]:
        """Inside of it, they are. A compiler makes one kernel of norms, turning and what is around them."""
        turns = (
            {} if is_compiled else {module: _turn_elsewhere(getattr(module, ROTARY), _turn) for module in self.turning}
        )
        with (
            _replaced([*self.forwards, *self.norm_forwards[is_compiled]], turns),
            nullcontext() if is_compiled else _deferring(self.deferred),
        ):
            try:
                yield
            finally:
                for group in self.groups:
                    group.products = None


class Watch:
    """The layers that a step calls, and what they read and give."""

    def __init__(self) -> None:
        self.times: Counter[nn.Module] = Counter()
        self.calls: list[tuple[nn.Module, torch.Tensor, torch.Tensor]] = []  # of what can be computed otherwise
        self.turns: list[tuple[ModuleType, tuple[torch.Tensor, ...], tuple[torch.Tensor, ...]]] = []
        self.readers = Readers()

    @contextmanager
    def watching(self, model: nn.Module) -> Iterator[None]:
        # quantized layers are of other classes; layers with a forward of their own compute otherwise
        layers = [m for m in model.modules() if (_is_linear(m) or _may_be_norm(m)) and "forward" not in vars(m)]
        turns = {
            module: _turn_elsewhere(turn, partial(self._note_turn, module, turn))
            for module in {sys.modules.get(type(each).__module__) for each in model.modules()}
            if module is not None and callable(turn := getattr(module, ROTARY, None))
        }
        with (
            _replaced([(layer, _elsewhere(layer, partial(self._note, layer))) for layer in layers], turns),
            self.readers,
        ):
            yield

    def _note(self, layer: nn.Module, x: torch.Tensor) -> torch.Tensor:
        output = type(layer).forward(layer, x)
        self.times[layer] += 1
        if _fits(layer, x):
            self.calls.append((layer, x, output))
            self.readers.begin(output)
        return output

    def _note_turn(self, module: ModuleType, turn: Turn, *tensors: torch.Tensor) -> Any:
        output = turn(*tensors)
        self.turns.append((module, tensors, output))
        return output

    def found(self, model: nn.Module) -> StepLayers:
        """What was seen; the same object for the same layers."""
        groups: dict[int, list[nn.Module]] = {}
        norms = []
        for layer, x, output in self.calls:  # every tensor of these is alive, so that no two share an id
            if self.times[layer] > 1:
                continue
            if _is_linear(layer):
                groups.setdefault(id(x), []).append(layer)
            elif _same(_norm(rms_norm, layer, x), output):
                norms.append(layer)
        deferred = {layer for layer, _, output in self.calls if self._is_joined(layer, output)}
        others = {module for module, tensors, output in self.turns if not _turns_so(tensors, output)}
        turning = list(dict.fromkeys(module for module, _, _ in self.turns if module not in others))
        self.calls, self.turns, self.readers = [], [], Readers()
        found, known = (list(groups.values()), norms, turning, deferred), _known.get(model)
        if known is None or known.parts != found:
            known = _known[model] = StepLayers(*found)
        return known

    def _is_joined(self, layer: nn.Module, output: torch.Tensor) -> bool:
        readers = self.readers.of(output)
        return bool(readers) and readers <= (AFTER_PRODUCTS if _is_linear(layer) else AFTER_NORMS)


class Readers(TorchDispatchMode):
    """The operators that read a tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.found: dict[int, set[Any]] = {}

    def begin(self, tensor: torch.Tensor) -> None:
        self.found[id(tensor)] = set()  # what had this id before is gone

    def of(self, tensor: torch.Tensor) -> set[Any]:
        return self.found[id(tensor)]

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: Any = None) -> Any:
        for each in tree_leaves((args, kwargs)):
            if (readers := self.found.get(id(each))) is not None:
                readers.add(func)
        return func(*args, **(kwargs or {}))


_known: "weakref.WeakKeyDictionary[nn.Module, StepLayers]" = weakref.WeakKeyDictionary()
_lock = threading.RLock()
_here = threading.local()  # meanwhile, other threads may call the same layers


def _is_linear(module: nn.Module) -> bool:
    return type(module) in (nn.Linear, GateLinear)


def _may_be_norm(module: Any) -> bool:
    names = [name for name, _ in module.named_parameters()]
    return names == ["weight"] and module.weight.ndim == 1 and _epsilon(module) is not None


def _epsilon(module: Any) -> Any:
    return next((getattr(module, name) for name in ("variance_epsilon", "eps") if hasattr(module, name)), None)


def _norm(form: Callable[..., torch.Tensor], norm: Any, x: torch.Tensor) -> torch.Tensor:
    return form(x, norm.weight, _epsilon(norm))


def _norm_or_deferred(norm: Any, x: torch.Tensor) -> torch.Tensor:
    deferring = _here.deferring
    return _norm(deferring.norm if norm in deferring.layers else rms_norm, norm, settled(x))


def _same(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Up to two roundings: of the normalised numbers, which some models round before they weigh them."""
    if one.shape != other.shape or one.dtype != other.dtype:
        return False
    return torch.allclose(one, other, rtol=2 * torch.finfo(one.dtype).eps, atol=1e-6)


def _fits(layer: Any, x: torch.Tensor) -> bool:
    """Whether the op for it takes the layer and what it reads."""
    if x.dtype not in (torch.float16, torch.bfloat16):
        return False
    if not _is_linear(layer):
        fits = layer.weight.shape == x.shape[-1:] and len(layer.weight) <= LARGEST_WIDTH
        return fits and layer.weight.dtype == x.dtype and use_fused("rms_norm", x)
    few = x.numel() <= MOST_ROWS * x.shape[-1]
    return few and layer.weight.dtype in (x.dtype, torch.float32) and use_fused("few_row_linear", x)


def _turn(query: torch.Tensor, key: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> tuple[torch.Tensor, ...]:
    (query, query_norm), (key, key_norm) = split_norm(query), split_norm(key)
    angles = (x.expand(len(query), -1, -1) for x in (cos, sin))
    return rotary(query, key, *angles, query_norm=query_norm, key_norm=key_norm)


def _turns_so(tensors: tuple[torch.Tensor, ...], output: tuple[torch.Tensor, ...]) -> bool:
    """Whether the op gives the same to the bit, in 16 bits; there are other forms of rotary embedding."""
    query = tensors[0]
    if query.dtype not in (torch.float16, torch.bfloat16) or not use_fused("rotary", query):
        return False
    try:
        turned = _turn(*tensors)
    except (ValueError, RuntimeError):  # of other shapes
        return False
    return all(one.dtype == other.dtype and torch.equal(one, other) for one, other in zip(turned, output, strict=True))


def _turn_elsewhere(turn: Turn, function: Turn) -> Turn:
    """As `_elsewhere`, for a function of a modelling file."""

    @wraps(turn)
    def rotate(*tensors: Any, **options: Any) -> Any:
        if getattr(_here, "replaces", False) and len(tensors) == 4 and not options:
            return function(*tensors)
        return turn(*tensors, **options)

    return rotate


def _elsewhere(layer: nn.Module, function: Forward) -> Forward:
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
def _replaced(forwards: list[tuple[nn.Module, Forward]], turns: Mapping[ModuleType, Turn]) -> Iterator[None]:
    with _lock:
        before = {module: getattr(module, ROTARY) for module in turns}
        for layer, forward in forwards:
            layer.__dict__["forward"] = forward
        for module, turn in turns.items():
            setattr(module, ROTARY, turn)
        _here.replaces = True
        try:
            yield
        finally:
            _here.replaces = False
            for module, turn in before.items():
                setattr(module, ROTARY, turn)
            for layer, _ in forwards:
                del layer.__dict__["forward"]
