"""Rotary position embedding of queries and keys by halves. See README.md in this folder."""

import torch

from retention_gates.kernels.checks import check_like, check_same_device
from retention_gates.kernels.dispatch import use_fused
from retention_gates.kernels.rotary import naive


def rotary(
    query: torch.Tensor,
    key: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    *,
    query_norm: tuple[torch.Tensor, float] | None = None,
    key_norm: tuple[torch.Tensor, float] | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Both rotated by the angle of their position, [B, HQ, T, D] and [B, H, T, D] in their dtype.

    Channel i and i + R / 2 are a pair, of the first R channels; the others stay. Each product and the sum are rounded
    to the dtype, as they are one operation after the other.

    Args:
        query: [B, HQ, T, D]; key: [B, H, T, D].
        cos, sin: [B, T, R] in the same dtype, R even and at most D.
        query_norm, key_norm: weight [D] in the same dtype and epsilon of an RMS norm before, rounded to the dtype.

    Raises:
        ValueError: for shapes, dtypes or devices that don't go together.
    """
    if query.ndim != 4 or key.ndim != 4 or query.shape[::2] != key.shape[::2] or query.shape[3] != key.shape[3]:
        raise ValueError(
            f"query {list(query.shape)} and key {list(key.shape)} must be [B, HQ, T, D] and [B, H, T, D], alike but "
            "for their heads."
        )
    batch, _, tokens, head_dim = query.shape
    for name, tensor in (("cos", cos), ("sin", sin)):
        rotated = tensor.shape[-1]
        if tuple(tensor.shape) != (batch, tokens, rotated) or rotated % 2 or not 0 < rotated <= head_dim:
            raise ValueError(
                f"{name} must have shape [B, T, R] = [{batch}, {tokens}, R], R even and at most {head_dim}, not "
                f"{list(tensor.shape)}."
            )
    for name, tensor in (("key", key), ("cos", cos), ("sin", sin)):
        if tensor.dtype != query.dtype:
            raise ValueError(f"{name} is {tensor.dtype} and query {query.dtype}: they must share one dtype.")
    if cos.shape != sin.shape:
        raise ValueError(f"cos {list(cos.shape)} and sin {list(sin.shape)} must have one shape.")
    for name, norm in (("query_norm", query_norm), ("key_norm", key_norm)):
        if norm is not None:
            check_like(f"{name}'s weight", norm[0], (head_dim,), "[D]", query.dtype, ("query", query))
    check_same_device("query", query, key=key, cos=cos, sin=sin)
    form = naive.rotary
    if use_fused("rotary", query):
        from retention_gates.kernels.rotary.fused import rotary as form
    return form(query, key, cos, sin, query_norm=query_norm, key_norm=key_norm)
