"""Watches one decoding step: the layers that it calls, their inputs and outputs, and the readers of these."""

import sys
import weakref
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from types import ModuleType
from typing import Any

import torch
from torch import nn

from retention_gates.compat import TorchDispatchMode, tree_leaves
from retention_gates.gates.decode.deferred import AFTER_NORMS, AFTER_PRODUCTS
from retention_gates.gates.decode.fused_layers import (
    ROTARY,
    FusedLayers,
    RotaryFunction,
    in_this_thread,
    is_linear,
    may_be_norm,
    norm_by,
    replaced_forwards,
    rotary_in_this_thread,
    rotate_by_op,
)
from retention_gates.kernels.dispatch import use_fused
from retention_gates.kernels.rms_norm import LARGEST_WIDTH, rms_norm
from retention_gates.kernels.small_batch_linear import MOST_ROWS


class Watch:
    """The layers that a step calls, and what they read and give."""

    def __init__(self) -> None:
        self.times: Counter[nn.Module] = Counter()
        self.calls: list[tuple[nn.Module, torch.Tensor, torch.Tensor]] = []  # of what can be computed otherwise
        self.rotations: list[tuple[ModuleType, tuple[torch.Tensor, ...], tuple[torch.Tensor, ...]]] = []
        self.readers = Readers()

    @contextmanager
    def watching(self, model: nn.Module) -> Iterator[None]:
        # quantized layers are of other classes; layers with a forward of their own compute otherwise
        layers = [m for m in model.modules() if (is_linear(m) or may_be_norm(m)) and "forward" not in vars(m)]
        rotations = {
            module: rotary_in_this_thread(rotation, partial(self._note_rotation, module, rotation))
            for module in {sys.modules.get(type(each).__module__) for each in model.modules()}
            if module is not None and callable(rotation := getattr(module, ROTARY, None))
        }
        with (
            replaced_forwards(
                [(layer, in_this_thread(layer, partial(self._note, layer))) for layer in layers], rotations
            ),
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

    def _note_rotation(self, module: ModuleType, rotation: RotaryFunction, *tensors: torch.Tensor) -> Any:
        output = rotation(*tensors)
        self.rotations.append((module, tensors, output))
        return output

    def found(self, model: nn.Module) -> FusedLayers:
        """Returns what was seen; the same object for the same layers."""
        groups: dict[int, list[nn.Module]] = {}
        norms = []
        for layer, x, output in self.calls:  # every tensor of these is alive, so that no two share an id
            if self.times[layer] > 1:
                continue
            if is_linear(layer):
                groups.setdefault(id(x), []).append(layer)
            elif _same(norm_by(rms_norm, layer, x), output):
                norms.append(layer)
        deferred = {layer for layer, _, output in self.calls if self._is_joined(layer, output)}
        others = {module for module, tensors, output in self.rotations if not _rotates_so(tensors, output)}
        rotating = list(dict.fromkeys(module for module, _, _ in self.rotations if module not in others))
        self.calls, self.rotations, self.readers = [], [], Readers()
        found, known = (list(groups.values()), norms, rotating, deferred), _known.get(model)
        if known is None or known.parts != found:
            known = _known[model] = FusedLayers(*found)
        return known

    def _is_joined(self, layer: nn.Module, output: torch.Tensor) -> bool:
        readers = self.readers.of(output)
        return bool(readers) and readers <= (AFTER_PRODUCTS if is_linear(layer) else AFTER_NORMS)


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


_known: "weakref.WeakKeyDictionary[nn.Module, FusedLayers]" = weakref.WeakKeyDictionary()


def _same(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Up to two roundings: of the normalised numbers, which some models round before they weigh them."""
    if one.shape != other.shape or one.dtype != other.dtype:
        return False
    return torch.allclose(one, other, rtol=2 * torch.finfo(one.dtype).eps, atol=1e-6)


def _fits(layer: Any, x: torch.Tensor) -> bool:
    """Whether the op for it takes the layer and what it reads."""
    if x.dtype not in (torch.float16, torch.bfloat16):
        return False
    if not is_linear(layer):
        fits = layer.weight.shape == x.shape[-1:] and len(layer.weight) <= LARGEST_WIDTH
        return fits and layer.weight.dtype == x.dtype and use_fused("rms_norm", x)
    few = x.numel() <= MOST_ROWS * x.shape[-1]
    return few and layer.weight.dtype in (x.dtype, torch.float32) and use_fused("small_batch_linear", x)


def _rotates_so(tensors: tuple[torch.Tensor, ...], output: tuple[torch.Tensor, ...]) -> bool:
    """Whether the op gives the same to the bit, in 16 bits; there are other forms of rotary embedding."""
    query = tensors[0]
    if query.dtype not in (torch.float16, torch.bfloat16) or not use_fused("rotary", query):
        return False
    try:
        rotated = rotate_by_op(*tensors)
    except (ValueError, RuntimeError):  # of other shapes
        return False
    return all(
        one.dtype == other.dtype and torch.equal(one, other) for one, other in zip(rotated, output, strict=True)
    )
