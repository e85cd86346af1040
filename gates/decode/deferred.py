"""Deferred results of a captured step's layers, which are computed in one launch with the operator that reads them.

A layer gives a `Deferred`, a tensor that has no numbers yet. The dispatcher shows the operator that reads it, and some
readers are one launch together with the layer: the rotary embedding after a norm, an activation after a linear layer,
its product with another one's result, a residual added to it. Any other reader finds the numbers, computed at that
moment.
"""

import weakref
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn

from retention_gates.compat import (
    TorchDispatchMode,
    disabled_torch_function,
    make_wrapper_subclass,
    operator_schema,
    storage_id,
    tree_leaves,
    tree_map_only,
)
from retention_gates.kernels.rms_norm import rms_norm
from retention_gates.kernels.small_batch_linear import small_batch_linear

aten = torch.ops.aten
WithNorm = tuple[torch.Tensor, tuple[torch.Tensor, float] | None]  # what a kernel reads, and the norm it begins with


class Work:
    """A computation that is still to be done, once."""

    def __init__(self, reads: torch.Tensor):
        self.reads = reads  # which must not change before
        self.result: torch.Tensor | None = None
        self.is_changed = False  # in place, by the model, in a view or in what this is a view of

    def compute(self) -> torch.Tensor:
        if self.is_changed:
            raise RuntimeError(
                "The model changes a layer's result in place and reads a view of it, or the other way round: pass "
                "graph=False."
            )
        if self.result is None:
            self.result = self._computed()
        return self.result

    def _computed(self) -> torch.Tensor:
        raise NotImplementedError


class Norm(Work):
    """RMS norm of what it reads."""

    def __init__(self, reads: torch.Tensor, weight: torch.Tensor, epsilon: float):
        super().__init__(reads)
        self.weight, self.epsilon = weight, epsilon

    def _computed(self) -> torch.Tensor:
        return rms_norm(self.reads, self.weight, self.epsilon)


class Products:
    """Linear layers that read the same x, all computed in the launch that the first of them needs."""

    def __init__(self, layers: Sequence[Any], x: torch.Tensor):
        self.layers, self.x = layers, x
        self.results: dict[tuple[int, bool], torch.Tensor] = {}  # by index, and whether it went through SiLU

    def result(self, index: int, has_silu: bool = False) -> torch.Tensor:
        if not self.results:
            silu = (index,) if has_silu else ()
            outputs = self.launch(range(len(self.layers)), silu=silu)
            self.results = {(i, i in silu): output for i, output in enumerate(outputs)}
        if (index, has_silu) not in self.results:  # the other form was asked for first
            (self.results[index, has_silu],) = self.launch([index], silu=(0,) if has_silu else ())
        return self.results[index, has_silu]

    def launch(self, indices: Iterable[int], **options: Any) -> list[torch.Tensor]:
        layers = [self.layers[i] for i in indices]
        return small_batch_linear(self.x, [each.weight for each in layers], [each.bias for each in layers], **options)


class Product(Work):
    """The result of one of several linear layers."""

    def __init__(self, products: Products, index: int, has_silu: bool = False):
        super().__init__(products.x)
        self.products, self.index, self.has_silu = products, index, has_silu

    def _computed(self) -> torch.Tensor:
        return self.products.result(self.index, self.has_silu)


class Deferred(torch.Tensor):
    """A contiguous tensor whose numbers are computed when they are read."""

    work: Work

    @staticmethod
    def __new__(cls, work: Work, shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> "Deferred":
        made = make_wrapper_subclass(cls, shape, dtype=dtype, device=device)
        made.work = work
        return made

    __torch_function__ = disabled_torch_function

    @classmethod
    def __torch_dispatch__(cls, *call: Any, **options: Any) -> Any:
        raise RuntimeError("What a layer gave is read after the step that it was captured in: pass graph=False.")

    def data_ptr(self) -> int:  # for kernels that are launched without torch's dispatcher
        return settled(self).data_ptr()


def settled(x: Any) -> Any:
    """The tensor with its numbers."""
    return x.work.compute() if isinstance(x, Deferred) else x


def split_norm(x: torch.Tensor) -> WithNorm:
    """x with its numbers and None, or what x is the norm of, not computed yet, and the norm."""
    if isinstance(x, Deferred) and isinstance(x.work, Norm) and x.work.result is None and not x.work.is_changed:
        return x.work.reads, (x.work.weight, x.work.epsilon)
    return settled(x), None


class Deferring(TorchDispatchMode):
    """Inside of it, results of these layers can be deferred."""

    def __init__(self, layers: Collection[nn.Module]) -> None:
        super().__init__()
        self.layers = layers
        self.works: list[weakref.ref[Work]] = []
        self.views: list[tuple[Work, Work]] = []  # one memory for the model, and two here

    def norm(self, x: torch.Tensor, weight: torch.Tensor, epsilon: float) -> torch.Tensor:
        return self._deferred(Norm(settled(x), weight, epsilon), x.shape, x.dtype, x.device)

    def product(self, products: Products, index: int) -> torch.Tensor:
        weight = products.layers[index].weight
        shape = (*products.x.shape[:-1], len(weight))
        return self._deferred(Product(products, index), shape, weight.dtype, weight.device)

    def _deferred(self, work: Work, shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        self.works = [each for each in self.works if each() is not None] + [weakref.ref(work)]
        return Deferred(work, shape, dtype, device)

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if written := {storage_id(each) for each in _written(func, args, kwargs)}:
            for view, whole in self.views:
                for one, other in ((view, whole), (whole, view)):
                    if one.result is not None and storage_id(one.result) in written:
                        other.is_changed = True
            for work in (each() for each in self.works):
                if work is not None and storage_id(work.reads) in written:
                    work.compute()
        if not kwargs and func in JOINS:
            joined = JOINS[func](self, *args)
            if joined is not None:
                return joined
        args, kwargs = tree_map_only(Deferred, settled, (args, kwargs))
        return func(*args, **kwargs)

    def _views(self, x: Any, views: list[torch.Tensor]) -> list[torch.Tensor]:
        for view in views:
            assert isinstance(view, Deferred)
            self.views.append((view.work, x.work))
        return views

    def transpose(self, x: torch.Tensor, first: int, second: int) -> torch.Tensor | None:
        """Of a norm, whose axis stays the last."""
        source, norm = split_norm(x)
        if norm is None or x.ndim - 1 in (first % x.ndim, second % x.ndim):
            return None
        return self._views(x, [self.norm(source.transpose(first, second), *norm)])[0]

    def split(self, x: torch.Tensor, size: int, axis: int = 0) -> list[torch.Tensor] | None:
        """Results of one layer that are split are those of as many layers."""
        work = _plain(x)
        if work is None or axis % x.ndim != x.ndim - 1 or len(work.products.layers) > 1:
            return None
        layer: Any = work.products.layers[0]
        weights = layer.weight.split(size)
        biases = [None] * len(weights) if layer.bias is None else layer.bias.split(size)
        parts = [SimpleNamespace(weight=weight, bias=bias) for weight, bias in zip(weights, biases, strict=True)]
        products = Products(parts, work.products.x)
        return self._views(x, [self.product(products, index) for index in range(len(parts))])

    def chunk(self, x: torch.Tensor, chunks: int, axis: int = 0) -> list[torch.Tensor] | None:
        return self.split(x, -(-x.shape[axis] // chunks), axis)

    def silu(self, x: torch.Tensor) -> torch.Tensor | None:
        work = _plain(x)
        if work is None:
            return None
        return self._deferred(Product(work.products, work.index, has_silu=True), x.shape, x.dtype, x.device)

    def multiply(self, one: Any, other: Any) -> torch.Tensor | None:
        """SiLU of one layer's result by the result of another that reads the same, if there are no more of these."""
        if getattr(getattr(one, "work", None), "has_silu", False):
            one, other = other, one
        plain, active = _plain(one), other.work if isinstance(other, Deferred) else None
        if plain is None or not isinstance(active, Product) or not active.has_silu:
            return None
        products = plain.products
        if active.products is not products or len(products.layers) != 2:
            return None
        if one.shape != other.shape or not one.dtype == other.dtype == products.x.dtype:
            return None
        return products.launch([active.index, plain.index], multiply=True)[0]

    def add(self, one: Any, other: Any) -> torch.Tensor | None:
        """A residual and the result of a layer that no other one reads the same as."""
        for residual, x in ((one, other), (other, one)):
            work = _plain(x)
            if work is None or not isinstance(residual, torch.Tensor) or len(work.products.layers) > 1:
                continue
            if residual.shape == x.shape and residual.dtype == x.dtype and residual.device == x.device:
                return work.products.launch([0], residual=settled(residual))[0]
        return None


# readers that may join linear layers
AFTER_PRODUCTS = {aten.silu.default, aten.mul.Tensor, aten.add.Tensor, aten.split.Tensor, aten.chunk.default}
AFTER_NORMS = {aten.transpose.int}  # and norms, before a rotary embedding
JOINS: dict[Any, Callable[..., Any]] = {
    aten.transpose.int: Deferring.transpose,
    aten.split.Tensor: Deferring.split,
    aten.chunk.default: Deferring.chunk,
    aten.silu.default: Deferring.silu,
    aten.mul.Tensor: Deferring.multiply,
    aten.add.Tensor: Deferring.add,
}


def _plain(x: Any) -> Product | None:
    """The work behind a linear layer's result that has not been read yet."""
    work = x.work if isinstance(x, Deferred) else None
    if not isinstance(work, Product) or work.has_silu or work.is_changed:
        return None
    return None if work.products.results else work


def _written(func: Any, args: tuple, kwargs: dict[str, Any]) -> Iterator[torch.Tensor]:
    """The tensors that an operator changes, with their numbers."""
    schema = operator_schema(func)
    if schema is None or not schema.is_mutable:
        return
    for position, argument in enumerate(schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            given = args[position] if position < len(args) else kwargs.get(argument.name)
            for each in tree_leaves(given):
                if isinstance(each, torch.Tensor):
                    yield settled(each)
