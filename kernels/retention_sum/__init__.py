"""Retained mass: the part of the past that is still held, in tokens. See README.md in this folder."""

import torch

from retention_gates.kernels.checks import check_document_ids, check_log_beta, check_same_device, may_look_at_values
from retention_gates.kernels.dispatch import use_fused
from retention_gates.kernels.retention_sum import naive


def retention_sum(
    log_beta: torch.Tensor, *, document_ids: torch.Tensor | None = None, chunk_size: int = 256
) -> torch.Tensor:
    """Retained mass S_t = sum_{i <= t} beta_i^(t - i) of every step, fp32 [B, H, T], in tokens; differentiable.

    Source: TRIM-KV, arXiv 2512.03324, the capacity loss. A protected token has log_beta = 0 and counts 1 for ever.

    Args:
        log_beta: fp32 [B, H, T], <= 0. Fused kernels copy one whose memory is not contiguous; it is as large as the
            output.
        document_ids: int64 [B, T]; each document's sum starts anew, padding (-1) gives 0 and counts 0. The tokens of a
            document lie side by side.
        chunk_size: steps summed at a time where no fused kernel runs; memory is B * H * chunk_size * T numbers there.

    Raises:
        ValueError: for shapes, dtypes or devices that don't go together, a positive log_beta, a document in pieces.
    """
    return _sum(log_beta, document_ids, chunk_size, over_heads=False)


def retention_sum_over_heads(
    log_beta: torch.Tensor, *, document_ids: torch.Tensor | None = None, chunk_size: int = 256
) -> torch.Tensor:
    """Retained mass of all heads together, fp32 [B, T], in tokens: retention_sum(...).sum(1), never holding [B, H, T].

    For a capacity over the whole model's memory, let H be the heads of all layers: torch.cat(layers, dim=1).
    Arguments and errors are those of `retention_sum`.
    """
    return _sum(log_beta, document_ids, chunk_size, over_heads=True)


def _sum(
    log_beta: torch.Tensor, document_ids: torch.Tensor | None, chunk_size: int, *, over_heads: bool
) -> torch.Tensor:
    check_log_beta(log_beta)
    check_document_ids(document_ids, log_beta)
    check_same_device("log_beta", log_beta, document_ids=document_ids)
    _check_in_one_piece(document_ids)
    if chunk_size < 1:
        raise ValueError(f"chunk_size must be at least 1 step, not {chunk_size}.")
    if use_fused("retention_sum", log_beta):
        from retention_gates.kernels.retention_sum import fused  # needs Triton

        return fused.retention_sum(log_beta, document_ids, over_heads=over_heads)
    return naive.retention_sum(log_beta, document_ids=document_ids, chunk_size=chunk_size, over_heads=over_heads)


def _check_in_one_piece(document_ids: torch.Tensor | None) -> None:
    """Raises ValueError if a document's tokens don't lie side by side: kernels know a document by its two ends."""
    if document_ids is None or not may_look_at_values(document_ids):
        return
    is_first = torch.ones_like(document_ids, dtype=torch.bool)
    is_first[:, 1:] = document_ids.diff(dim=-1) != 0
    begun = torch.where(is_first, document_ids, -1).sort(-1).values
    again = (begun.diff(dim=-1) == 0) & (begun[:, 1:] >= 0)
    if bool(again.any()):
        raise ValueError(
            f"document_ids must keep each document in one piece, but document {int(begun[:, 1:][again][0])} goes on "
            "after other tokens of its row: give the parts different numbers, and pad at the row's ends only."
        )
