"""Whole tensors from parameters of which every rank holds a part: FSDP2's and DeepSpeed's ZeRO-3."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch


def whole(parameter: torch.Tensor) -> torch.Tensor:
    """The tensor itself, or all of it where FSDP2 gives each rank a part: then every rank has to call.

    Parameters of ZeRO-3 are whole inside `gathered` only.
    """
    if torch.distributed.is_available():
        from torch.distributed.tensor import DTensor

        if isinstance(parameter, DTensor):
            return parameter.full_tensor()
    return parameter


@contextmanager
def gathered(parameters: Iterable[torch.Tensor]) -> Iterator[None]:
    """Inside the block, parameters that ZeRO-3 has divided are whole, for reading; every rank has to enter."""
    divided = [parameter for parameter in parameters if is_divided(parameter)]
    if not divided:
        yield
        return
    import deepspeed  # type: ignore[import-not-found]

    with deepspeed.zero.GatheredParameters(divided):
        yield


def is_divided(parameter: torch.Tensor) -> bool:
    """Whether ZeRO-3 has given each rank a part of the parameter."""
    return hasattr(parameter, "ds_id")
