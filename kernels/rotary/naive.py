"""The equation in plain torch."""

import torch


def rotary(
    query: torch.Tensor, key: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Arguments and result as in the package's `rotary`."""
    return _turned(query, cos[:, None], sin[:, None]), _turned(key, cos[:, None], sin[:, None])


def _turned(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    turned = cos.shape[-1]
    pairs, rest = x[..., :turned], x[..., turned:]
    first, second = pairs.chunk(2, dim=-1)
    pairs = pairs * cos + torch.cat([-second, first], dim=-1) * sin
    return torch.cat([pairs, rest], dim=-1) if rest.shape[-1] else pairs
