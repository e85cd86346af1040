"""The products one after the other, in plain torch."""

from collections.abc import Collection, Sequence

import torch
import torch.nn.functional as F


def small_batch_linear(
    x: torch.Tensor,
    weights: Sequence[torch.Tensor],
    biases: Sequence[torch.Tensor | None],
    *,
    silu: Collection[int] = (),
    residual: torch.Tensor | None = None,
    multiply: bool = False,
) -> list[torch.Tensor]:
    """Arguments and result as in the package's `small_batch_linear`."""
    outputs = [F.linear(x.to(weight.dtype), weight, bias) for weight, bias in zip(weights, biases, strict=True)]
    if multiply:
        return [F.silu(outputs[0]) * outputs[1]]
    outputs = [F.silu(output) if index in silu else output for index, output in enumerate(outputs)]
    return outputs if residual is None else [residual + outputs[0]]
