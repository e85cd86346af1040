"""How much of the past is still held, in tokens. See README.md in this folder."""

import torch

from retention_gates.kernels.checks import check_document_ids, check_log_beta, check_same_device
from retention_gates.kernels.retention_sum import naive


def retention_sum(
    log_beta: torch.Tensor, *, document_ids: torch.Tensor | None = None, chunk_size: int = 256
) -> torch.Tensor:
    """Retained mass S_t = sum_{i <= t} beta_i^(t - i) of every step, fp32 [B, H, T], in tokens; differentiable.

    Source: TRIM-KV, arXiv 2512.03324, the capacity loss. A protected token has log_beta = 0 and counts 1 for ever.

    Args:
        log_beta: fp32 [B, H, T], <= 0.
        document_ids: int64 [B, T]; each document's sum starts anew, padding (-1) gives 0 and counts 0.
        chunk_size: steps summed at a time; memory is B * H * chunk_size * T numbers.

    Raises:
        ValueError: for shapes, dtypes or devices that don't go together, and for a positive log_beta.
    """
    check_log_beta(log_beta)
    check_document_ids(document_ids, log_beta)
    check_same_device("log_beta", log_beta, document_ids=document_ids)
    if chunk_size < 1:
        raise ValueError(f"chunk_size must be at least 1 step, not {chunk_size}.")
    return naive.retention_sum(log_beta, document_ids=document_ids, chunk_size=chunk_size)
