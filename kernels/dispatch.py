"""Chooses the form of an op: its fused kernel, written in Triton, or naive.py, the equation in plain torch."""

import logging
import os
from collections.abc import Callable
from functools import cache, wraps
from importlib.util import find_spec
from typing import Any

import torch

from retention_gates.kernels.checks import may_look_at_values

VARIABLE = "RETENTION_GATES_KERNELS"
HAS_TRITON = find_spec("triton") is not None
ASSUMED_MULTIPROCESSORS = 132  # where there is no device to ask
logger = logging.getLogger("retention_gates.kernels")
_told: set[tuple[str, str, str]] = set()


def use_fused(op: str, tensor: torch.Tensor) -> bool:
    """Whether `op` runs fused on the device of `tensor`: on CUDA with Triton yes, elsewhere no.

    RETENTION_GATES_KERNELS=naive or fused decides otherwise, for debugging. The log says once per op which one runs.

    Raises:
        ValueError: for another value of the variable, and for "fused" where no kernel can run.
    """
    wanted = os.environ.get(VARIABLE, "")
    if wanted not in ("", "naive", "fused"):
        raise ValueError(f"{VARIABLE}={wanted!r} is unknown: set it to 'naive' or 'fused', or leave it unset.")
    device = tensor.device.type
    possible = HAS_TRITON and (device == "cuda" or (device == "cpu" and _interpreted()))
    if wanted == "fused" and not possible:
        raise ValueError(
            f"{VARIABLE}=fused, but {op} got tensors on {tensor.device}: fused kernels need CUDA and Triton (or "
            "TRITON_INTERPRET=1 on a CPU, for tests). Move the tensors, or unset the variable."
        )
    # the interpreter is thousands of times slower than naive.py, so that it runs only when asked for
    fused = possible and wanted != "naive" and (device == "cuda" or wanted == "fused")
    if not torch.compiler.is_compiling():
        _tell(op, "fused (Triton)" if fused else "naive (plain torch)", device)
    return fused


def use_cpu(tensor: torch.Tensor) -> bool:
    """Whether an op that does not run fused may choose by the numbers in its tensors: on a CPU, unless it is traced.

    Not where RETENTION_GATES_KERNELS asks for a form.
    """
    return tensor.device.type == "cpu" and may_look_at_values(tensor) and not os.environ.get(VARIABLE)


def on_own_device(op: Callable[..., Any]) -> Callable[..., Any]:
    """Lets an op run on the device of its first argument: Triton launches on the current one, which may be another."""

    @wraps(op)
    def run(tensor: torch.Tensor, *arguments: Any, **options: Any) -> Any:
        with torch.cuda.device_of(tensor):
            return op(tensor, *arguments, **options)

    return run


@cache
def multiprocessors(device: torch.device) -> int:
    """Returns the number of programs that the device runs side by side, or several times as many if they are small."""
    if device.type != "cuda":
        return ASSUMED_MULTIPROCESSORS
    return torch.cuda.get_device_properties(device).multi_processor_count


def _interpreted() -> bool:
    return os.environ.get("TRITON_INTERPRET") == "1"


def _tell(op: str, form: str, device: str) -> None:
    if (op, form, device) not in _told:
        _told.add((op, form, device))
        logger.info("%s runs %s on %s", op, form, device)
