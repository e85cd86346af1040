"""Linear layers that read the same few rows, such as one new token of each sequence. See README.md in this folder."""

from collections.abc import Collection, Sequence

import torch

from retention_gates.kernels.checks import check_like, check_same_device, check_shape
from retention_gates.kernels.dispatch import use_fused
from retention_gates.kernels.small_batch_linear import naive

MOST_ROWS = 32


def small_batch_linear(
    x: torch.Tensor,
    weights: Sequence[torch.Tensor],
    biases: Sequence[torch.Tensor | None],
    *,
    silu: Collection[int] = (),
    residual: torch.Tensor | None = None,
    multiply: bool = False,
) -> list[torch.Tensor]:
    """`x W^T + b` for every weight and bias, [..., N_i] each in the weight's dtype, accumulated in fp32.

    What a model does next with the results is rounded after each step, as layers of their own would.

    Args:
        x: [..., C], at most 32 rows in all, float16 or bfloat16.
        weights: [N_i, C] each, in the dtype of x or in float32, which reads x as float32.
        biases: [N_i] each in its weight's dtype, or None.
        silu: indices of results that go through SiLU.
        residual: [..., N_0] in the dtype of the only weight, added to its result.
        multiply: the only result is SiLU of the first of two times the second, [..., N_0]. Both are in the dtype of x.

    Raises:
        ValueError: for shapes, dtypes or devices that don't go together.
    """
    rows = x.numel() // max(1, x.shape[-1])
    if x.dtype not in (torch.float16, torch.bfloat16):
        raise ValueError(f"x is {x.dtype}; it must be torch.float16 or torch.bfloat16. F.linear takes the others.")
    if not 1 <= rows <= MOST_ROWS:
        raise ValueError(f"x has {rows} rows; 1 to {MOST_ROWS} are read at a time. F.linear takes more.")
    if not weights or len(weights) != len(biases):
        raise ValueError(
            f"There are {len(weights)} weights and {len(biases)} biases: give one bias, or None, for each."
        )
    for index, (weight, bias) in enumerate(zip(weights, biases, strict=True)):
        name = f"weights[{index}]"
        check_shape(name, weight, (weight.shape[0], x.shape[-1]), "[N, C]")
        if weight.dtype not in (x.dtype, torch.float32):
            raise ValueError(f"{name} is {weight.dtype}; it must be that of x, {x.dtype}, or torch.float32.")
        if weight.stride(1) != 1:
            raise ValueError(f"{name} has strides {weight.stride()}: its rows must be contiguous.")
        if bias is not None:
            check_shape(f"biases[{index}]", bias, (weight.shape[0],), "[N]")
            if bias.dtype != weight.dtype:
                raise ValueError(f"biases[{index}] is {bias.dtype} and {name} {weight.dtype}: they must be alike.")
        check_same_device("x", x, **{name: weight, f"biases[{index}]": bias})
    if not set(silu) <= set(range(len(weights))):
        raise ValueError(f"silu={sorted(silu)} must be indices of the {len(weights)} weights.")
    if residual is not None:
        if len(weights) != 1:
            raise ValueError(f"residual is added to the result of one weight, not of {len(weights)}.")
        shape = (*x.shape[:-1], weights[0].shape[0])
        check_like("residual", residual, shape, "[..., N_0]", weights[0].dtype, ("x", x))
    if multiply:
        if len(weights) != 2 or silu:
            raise ValueError(
                f"multiply takes two weights and no silu of its own, not {len(weights)} and silu={sorted(silu)}."
            )
        for index in range(2):
            check_like(f"weights[{index}]", weights[index], tuple(weights[0].shape), "[N_0, C]", x.dtype, ("x", x))
    form = naive.small_batch_linear
    if use_fused("small_batch_linear", x):
        from retention_gates.kernels.small_batch_linear.fused import small_batch_linear as form
    return form(x, weights, biases, silu=silu, residual=residual, multiply=multiply)
