"""Layers of a recorded step in 16 bits, computed in fewer launches.

Linear layers that read the same tensor are computed together when the first of them is called, RMS norms are one
kernel each, and queries and keys are turned by one. Which layers that are is seen, not known: one step is watched, and
what it saw holds at every step, because a recorded step makes no choices. Outside of a recording layers are called as
ever.
"""

import sys
import threading
import weakref
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial, wraps
from types import ModuleType
from typing import Any

import torch
from torch import nn

from retention_gates.gates.gate import GateLinear
from retention_gates.kernels.dispatch import use_fused
from retention_gates.kernels.few_row_linear import MOST_ROWS, few_row_linear
from retention_gates.kernels.rms_norm import LARGEST_WIDTH, naive, rms_norm
from retention_gates.kernels.rotary import rotary

Forward = Callable[[torch.Tensor], torch.Tensor]
Turn = Callable[..., Any]
ROTARY = "apply_rotary_pos_emb"  # the function's name in transformers' modelling files


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

    def __init__(self, groups: list[list[nn.Module]], norms: list[nn.Module], turning: Sequence[ModuleType] = ()):
        self.groups, self.norms = [Group(layers) for layers in groups], norms
        # made once: for other functions a compiled step would be compiled again
        self.forwards = [
            (layer, _elsewhere(layer, partial(group.output, index)))
            for group in self.groups
            for index, layer in enumerate(group.layers)
        ]
        self.norm_forwards = {
            is_compiled: [(norm, _elsewhere(norm, partial(_norm, form, norm))) for norm in norms]
            for is_compiled, form in ((False, rms_norm), (True, naive.rms_norm))
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
        with _replaced([*self.forwards, *self.norm_forwards[is_compiled]], turns):
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
        self.turns: list[tuple[ModuleType, tuple[torch.Tensor, ...], tuple[torch.Tensor, ...]]] = []

    @contextmanager
    def watching(self, model: nn.Module) -> Iterator[None]:
        # quantized layers are of other classes; layers with a forward of their own compute otherwise
        layers = [m for m in model.modules() if (_is_linear(m) or _may_be_norm(m)) and "forward" not in vars(m)]
        turns = {
            module: _turn_elsewhere(turn, partial(self._note_turn, module, turn))
            for module in {sys.modules.get(type(each).__module__) for each in model.modules()}
            if module is not None and callable(turn := getattr(module, ROTARY, None))
        }
        with _replaced([(layer, _elsewhere(layer, partial(self._note, layer))) for layer in layers], turns):
            yield

    def _note(self, layer: nn.Module, x: torch.Tensor) -> torch.Tensor:
        output = type(layer).forward(layer, x)
        self.times[layer] += 1
        if _fits(layer, x):
            self.calls.append((layer, x, output))
        return output

    def _note_turn(self, module: ModuleType, turn: Turn, *tensors: torch.Tensor) -> Any:
        output = turn(*tensors)
        self.turns.append((module, tensors, output))
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
            elif _same(_norm(rms_norm, layer, x), output):
                norms.append(layer)
        others = {module for module, tensors, output in self.turns if not _turns_so(tensors, output)}
        turning = list(dict.fromkeys(module for module, _, _ in self.turns if module not in others))
        self.calls, self.turns = [], []
        found, known = (list(groups.values()), norms, turning), _known.get(model)
        if known is None or ([each.layers for each in known.groups], known.norms, known.turning) != found:
            known = _known[model] = StepLayers(*found)
        return known


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
    return rotary(query, key, *(x.expand(len(query), -1, -1) for x in (cos, sin)))


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
