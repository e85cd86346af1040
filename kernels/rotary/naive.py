"""The equation in plain torch."""

import torch
import torch.nn.functional as F


def rotary(
    query: torch.Tensor,
    key: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    *,
    query_norm: tuple[torch.Tensor, float] | None = None,
    key_norm: tuple[torch.Tensor, float] | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Arguments and result as in the package's `rotary`."""
    if query_norm is not None:
        query = F.rms_norm(query, query.shape[-1:], *query_norm)
    if key_norm is not None:
        key = F.rms_norm(key, key.shape[-1:], *key_norm)
    return _rotated(query, cos[:, None], sin[:, None]), _rotated(key, cos[:, None], sin[:, None])


def _rotated(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    rotated = cos.shape[-1]
    pairs, rest = x[..., :rotated], x[..., rotated:]
    first, second = pairs.chunk(2, dim=-1)
    pairs = pairs * cos + torch.cat([-second, first], dim=-1) * sin
    return torch.cat([pairs, rest], dim=-1) if rest.shape[-1] else pairs
