"""Attention of one token over slots that are all taken, on a CPU, where looking whether they are costs nothing."""

from typing import Any

import torch
import torch.nn.functional as F

from retention_gates.kernels.ragged_decode_attention import naive
from retention_gates.kernels.softmax import Softmax


def ragged_decode_attention(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    positions: torch.Tensor,
    head_offsets: tuple[int, ...],
    softmax: Softmax,
    **options: Any,
) -> torch.Tensor:
    """Arguments and result as in the package's `ragged_decode_attention`.

    In fp32 without options it is torch's own attention, of equal heads at once, over slots where they lie. It would
    round the weights of 16-bit values, and naive.py does not.
    """
    is_plain = query.dtype == torch.float32 and softmax.is_plain and all(each is None for each in options.values())
    if not is_plain or int(positions.min()) < 0:
        return naive.ragged_decode_attention(query, keys, values, positions, head_offsets, softmax, **options)
    grouped = query.reshape(len(query), len(head_offsets) - 1, -1, query.shape[3])  # [B, H, G, D]
    outputs = []
    for first, last in naive.equal_heads(head_offsets):
        own, shape = slice(head_offsets[first], head_offsets[last]), (last - first, -1)
        key, value = (x[:, own].unflatten(1, shape) for x in (keys, values))  # [B, h, S, D]
        outputs.append(F.scaled_dot_product_attention(grouped[:, first:last], key, value, scale=softmax.scale))
    return torch.cat(outputs, dim=1).view(len(query), query.shape[1], 1, -1)
