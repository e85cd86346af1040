"""The stretch of a row that each token sees, and the stretch that sees it."""

import torch

from retention_gates.kernels.memo import memo


@memo
def visible_spans(
    document_ids: torch.Tensor | None, sliding_window: int | None, shape: tuple[int, int], device: torch.device
) -> tuple[torch.Tensor, torch.Tensor] | None:
    """first and last, int32 [B, T]: query t sees key i iff first[t] <= i <= t and t <= last[i]; None: all i <= t.

    A document is a stretch of tokens with one id; padding (-1) inside does not end it. Padding sees nothing
    (first = T) and is never seen (last = -1).

    Args:
        document_ids: int64 [B, T], or None if every row is one document.
        sliding_window: keys that a query sees, itself among them, or None for all.
        shape: B and T.
    """
    if document_ids is None and sliding_window is None:
        return None
    batch, tokens = shape
    index = torch.arange(tokens, device=device).expand(batch, tokens)
    if document_ids is None:
        first, last = torch.zeros_like(index), torch.full_like(index, tokens - 1)
    else:
        real = document_ids >= 0
        last_real = torch.where(real, index, -1).cummax(1).values  # of the tokens up to this one
        before = torch.cat([last_real.new_full((batch, 1), -1), last_real[:, :-1]], dim=1)
        begins = real & ((before < 0) | (document_ids.gather(1, before.clamp(min=0)) != document_ids))
        first = torch.where(begins, index, 0).cummax(1).values
        later = torch.where(begins, index, tokens).flip(1).cummin(1).values.flip(1)  # start of a document from here on
        next_start = torch.cat([later[:, 1:], later.new_full((batch, 1), tokens)], dim=1)
        last = last_real.gather(1, next_start - 1)  # trailing padding is no part of a document
        first, last = first.masked_fill(~real, tokens), last.masked_fill(~real, -1)
    if sliding_window is not None:
        first = torch.maximum(first, index - (sliding_window - 1))
        last = torch.minimum(last, index + (sliding_window - 1))
    return first.int(), last.int()
