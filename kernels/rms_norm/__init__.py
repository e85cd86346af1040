"""Root mean square norm of rows in 16 bits. See README.md in this folder."""

import torch

from retention_gates.kernels.checks import check_same_device, check_shape
from retention_gates.kernels.dispatch import use_fused
from retention_gates.kernels.rms_norm import naive

LARGEST_WIDTH = 16_384


def rms_norm(x: torch.Tensor, weight: torch.Tensor, epsilon: float) -> torch.Tensor:
    """`x / sqrt(mean(x^2) + epsilon) * weight` over the last axis, in fp32 and rounded once, in the dtype of x.

    Args:
        x: [..., C], float16 or bfloat16, C at most 16,384.
        weight: [C], in the same dtype.

    Raises:
        ValueError: for shapes, dtypes or devices that don't go together.
    """
    if x.dtype not in (torch.float16, torch.bfloat16) or not 0 < x.shape[-1] <= LARGEST_WIDTH:
        raise ValueError(
            f"x is {list(x.shape)} of {x.dtype}; it must be [..., C] with C from 1 to {LARGEST_WIDTH}, in float16 or "
            "bfloat16. F.rms_norm takes the others."
        )
    check_shape("weight", weight, (x.shape[-1],), "[C]")
    if weight.dtype != x.dtype:
        raise ValueError(f"weight is {weight.dtype} and x {x.dtype}: they must share one dtype.")
    check_same_device("x", x, weight=weight)
    form = naive.rms_norm
    if use_fused("rms_norm", x):
        from retention_gates.kernels.rms_norm.fused import rms_norm as form
    return form(x, weight, epsilon)
