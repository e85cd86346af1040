"""Ranks that share rows: between layers each holds its part of the tokens, in attention all tokens of some heads.

Ulysses sequence parallelism (DeepSpeed-Ulysses, arXiv 2309.14509). DeepSpeed's own wrapper of attention functions,
UlyssesSPAttentionHF, cannot do it here: it exchanges queries, keys, values and position_ids, while a gate's log_beta
and its documents would stay those of a rank's part.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

from retention_gates.kernels.memo import memo


class RowGroup:
    """The P ranks of a process group, rank i of which holds the tokens from i * T / P on of rows of T tokens.

    All of them have to call with tensors of the same shape.
    """

    def __init__(self, process_group: Any):
        self.process_group = process_group
        self.size, self.rank = dist.get_world_size(process_group), dist.get_rank(process_group)

    def exchange(self, x: torch.Tensor) -> torch.Tensor:
        """[B, X, Y, D] -> [B, X / P, Y * P, D]: from some tokens of all heads to all tokens of some heads, or back."""
        received = _AllToAll.apply(torch.stack(x.chunk(self.size, 1)), self.process_group)
        return torch.cat(received.unbind(), 2)

    def whole(self, x: torch.Tensor) -> torch.Tensor:
        """[..., T / P] -> [..., T], the same on every rank; a gradient is summed over what all ranks make of it."""
        received = _AllToAll.apply(x.expand(self.size, *x.shape).contiguous(), self.process_group)
        return torch.cat(received.unbind(), -1)

    def own_heads(self, x: torch.Tensor) -> torch.Tensor:
        """[B, H, ...] -> [B, H / P, ...]: the heads that this rank attends with."""
        return x.chunk(self.size, 1)[self.rank]


class _AllToAll(torch.autograd.Function):
    """[P, ...]: part i goes to rank i, and from rank i comes part i; gradients go back the same way."""

    @staticmethod
    def forward(ctx: Any, parts: torch.Tensor, process_group: Any) -> torch.Tensor:
        ctx.process_group = process_group
        received = torch.empty_like(parts)
        dist.all_to_all_single(received, parts, group=process_group)
        return received

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        return _AllToAll.apply(gradient.contiguous(), ctx.process_group), None


@memo
def whole_ids(ids: torch.Tensor | None, group: RowGroup | None) -> torch.Tensor | None:
    """A padding mask or position_ids of whole rows [B, T], from those of this rank's part; None stays None.

    All layers of a pass ask for the same ones: they are exchanged once.
    """
    return ids if ids is None or group is None else group.whole(ids.long())


def attend_by_heads(
    group: RowGroup,
    attend: Callable[..., tuple[torch.Tensor, Any]],
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    **options: Any,
) -> tuple[torch.Tensor, None]:
    """`attend` for this rank's heads and whole rows; arguments and result as those of `attention_forward`.

    Args:
        query: [B, HQ, T / P, D]; key and value: [B, H, T / P, D]; attention_mask: of whole rows.
        options: log_beta [B, H, T] and document_ids [B, T] of whole rows, position_ids [B, T / P].
    """
    if options.get("log_beta") is not None:
        options["log_beta"] = group.own_heads(options["log_beta"])
    options["position_ids"] = whole_ids(options.get("position_ids"), group)  # where flash attention reads documents
    query, key, value = (group.exchange(x) for x in (query, key, value))
    output, _ = attend(module, query, key, value, attention_mask, **options)  # [B, T, HQ / P, D]
    return group.exchange(output), None
