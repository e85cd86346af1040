"""Finds the document of its row that each token belongs to."""

import torch

from retention_gates.kernels.dispatch import use_cpu
from retention_gates.kernels.memo import memo


@memo
def document_ids_from(
    attention_mask: torch.Tensor | None, position_ids: torch.Tensor | None, batch_size: int
) -> torch.Tensor | None:
    """Document index of every token [B, T], -1 for padding; None if the rows are one document each.

    Packing shows as position_ids that do not go up by one, and only where there is no mask: as in transformers.

    Args:
        attention_mask: 2-D padding mask [B, T], 1 or True for real tokens.
        position_ids: [B, T] or [1, T].

    Raises:
        ValueError: for a mask that is not 2-D; ages cannot be read from it.
    """
    if attention_mask is not None:
        check_padding_mask(attention_mask)
        return attention_mask.long() - 1
    if position_ids is None:
        return None
    starts = torch.zeros_like(position_ids)
    starts[:, 1:] = position_ids.diff(dim=-1) != 1
    return starts.cumsum(-1).expand(batch_size, -1)


def check_padding_mask(attention_mask: torch.Tensor | None) -> None:
    """Raises ValueError for a mask that is not 2-D: neither ages nor what is padding can be read from it."""
    if attention_mask is not None and attention_mask.ndim != 2:
        raise ValueError(
            f"Retention gates need a 2-D padding mask [batch, tokens], not a mask {list(attention_mask.shape)}: "
            "pass the padding mask itself, or switch the gates off with model.disable_adapter()."
        )


@memo
def padding_in(attention_mask: torch.Tensor | None, batch_size: int, tokens: int) -> torch.Tensor | None:
    """The padding mask [B, S], S >= T, as bool; on a CPU, where looking at it costs nothing, None if all is real.

    Raises:
        ValueError: as `check_padding_mask`.
    """
    check_padding_mask(attention_mask)
    if attention_mask is None:
        return None
    mask = attention_mask.bool()
    fits = len(mask) == batch_size and mask.shape[1] >= tokens  # what does not is for the cache to refuse
    if fits and use_cpu(mask) and bool(mask.all()):
        return None
    return mask


@memo
def document_offsets(document_ids: torch.Tensor) -> torch.Tensor:
    """Position of every token inside its document [B, T]; without meaning for padding."""
    index = torch.arange(document_ids.shape[-1], device=document_ids.device).expand_as(document_ids)
    is_start = torch.ones_like(document_ids, dtype=torch.bool)
    is_start[:, 1:] = document_ids.diff(dim=-1) != 0
    return index - torch.where(is_start, index, 0).cummax(-1).values
