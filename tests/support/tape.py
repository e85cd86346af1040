"""What a CUDA graph does, on a CPU: operators on fixed tensors, run again in the same order without any Python."""

from collections.abc import Callable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

WAITS = {torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default}


class Tape(TorchDispatchMode):
    """Notes every operator that runs inside of it, with the very tensors that it read and made."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Callable, tuple, dict, list[torch.Tensor]]] = []
        self.waits: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func in WAITS:
            self.waits.append(str(func))
        self.calls.append((func, args, kwargs or {}, tensors(result)))
        return result

    def replay(self) -> None:
        for func, args, kwargs, before in self.calls:
            # what shares memory with an argument, a view or a tensor changed in place, is there already
            storages = {tensor.untyped_storage().data_ptr() for tensor in tensors((args, kwargs))}
            after = tensors(func(*args, **kwargs))
            for old, new in zip(before, after, strict=True):
                if old.untyped_storage().data_ptr() not in storages:
                    old.copy_(new)


class TapeRecorder:
    """A Recorder as decode_step wants one."""

    captures = 0
    replays = 0

    def __init__(self, device: torch.device):
        self.device = device

    def warm_up(self, step: Callable[[], Any]) -> tuple[Any, str | None]:
        with Tape() as tape:
            output = step()
        return output, f"of {tape.waits[0]}" if tape.waits else None

    def capture(self, step: Callable[[], Any]) -> tuple[Any, Callable[[], None]]:
        with Tape() as tape:
            output = step()
        assert not tape.waits
        TapeRecorder.captures += 1

        def replay() -> None:
            TapeRecorder.replays += 1
            tape.replay()

        return output, replay


def tensors(tree: Any) -> list[torch.Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)]
