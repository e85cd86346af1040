"""Retained mass in plain torch: the reference, and what runs where there is no fused kernel."""

import torch
from torch.utils.checkpoint import checkpoint


def retention_sum(
    log_beta: torch.Tensor,
    *,
    document_ids: torch.Tensor | None = None,
    chunk_size: int = 256,
    over_heads: bool = False,
) -> torch.Tensor:
    """Retained mass of every step, [B, H, T], or with `over_heads` that of all heads together, [B, T].

    Arguments as in the package's `retention_sum`, any floating dtype.
    """
    differentiate = torch.is_grad_enabled() and log_beta.requires_grad
    sums = []
    for start in range(0, log_beta.shape[-1], chunk_size):
        rows = min(chunk_size, log_beta.shape[-1] - start)
        seen = slice(0, start + rows)
        documents = None if document_ids is None else document_ids[:, seen]
        if differentiate:
            # so that backward computes the chunk's terms again, and no [T, T] is kept in pieces
            mass = checkpoint(
                _sum,
                log_beta[:, :, seen],
                documents,
                rows,
                over_heads,
                use_reentrant=False,
                preserve_rng_state=False,
            )
        else:
            mass = _sum(log_beta[:, :, seen], documents, rows, over_heads)
        sums.append(mass)
    return torch.cat(sums, dim=-1)


def _sum(log_beta: torch.Tensor, document_ids: torch.Tensor | None, rows: int, over_heads: bool) -> torch.Tensor:
    """Retained mass [B, H, R] or [B, R] of the last R of S positions; log_beta is [B, H, S]."""
    position = torch.arange(log_beta.shape[-1], device=log_beta.device)
    age = position[-rows:, None] - position  # [R, S]
    left_out = age < 0
    if document_ids is not None:
        # a padded row leaves out everything, itself too
        left_out = left_out | (document_ids[:, None, -rows:, None] != document_ids[:, None, None, :])
        left_out = left_out | (document_ids[:, None, -rows:, None] < 0)
    log_retention = age * log_beta[:, :, None, :]  # [B, H, R, S]
    retention = log_retention.masked_fill(left_out, float("-inf")).exp()
    return retention.sum((1, 3) if over_heads else 3)
