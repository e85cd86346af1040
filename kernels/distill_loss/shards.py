"""The frozen output head as it comes: whole, or in shards of the vocabulary on devices of their own."""

from collections.abc import Sequence

import torch

from retention_gates.kernels.checks import check_shape

Shards = torch.Tensor | Sequence[torch.Tensor]

HELD_BYTES = (
    900 * 2**20
)  # what both forms hold in logits by default: with the gradient it stays below 1 GiB at T = 16K


def as_shards(head: Shards | None) -> list[torch.Tensor]:
    """[V_k, C] each (or [V_k], for a bias): one for a whole head, none for None."""
    if head is None:
        return []
    return [head] if isinstance(head, torch.Tensor) else list(head)


def replicated(name: str, tensor: torch.Tensor) -> torch.Tensor:
    """`tensor`, or the tensor behind it if it is a DTensor that every rank holds as a whole.

    Raises:
        ValueError: for a DTensor of which this rank holds a part: the positions of this rank need the whole head.
    """
    if not torch.distributed.is_available():
        return tensor
    from torch.distributed.tensor import DTensor, Replicate

    if not isinstance(tensor, DTensor):
        return tensor
    if not all(isinstance(placement, Replicate) for placement in tensor.placements):
        raise ValueError(
            f"{name} is a DTensor with placements {tensor.placements}, of which this rank holds a part: pass "
            f"{name}.full_tensor(), or leave the output head out of the sharding."
        )
    return tensor.to_local()


def check_head(
    weight: Shards, bias: Shards | None, hidden_size: int
) -> tuple[list[torch.Tensor], list[torch.Tensor], int]:
    """weight's and bias's shards, and V.

    Raises:
        ValueError: for shapes, dtypes or devices that don't go together.
    """
    weights = [replicated("weight", shard) for shard in as_shards(weight)]
    biases = [replicated("bias", shard) for shard in as_shards(bias)]
    if not weights:
        raise ValueError("weight is an empty sequence: pass the head [V, C], or its shards [V_k, C].")
    for shard in weights:
        check_shape("weight", shard, (shard.shape[0], hidden_size), "[V, C]")
        if shard.dtype != weights[0].dtype or not shard.is_floating_point():
            raise ValueError(
                f"weight has shards of {shard.dtype} and {weights[0].dtype}: give all one floating dtype."
            )
        if not shard.shape[0]:
            raise ValueError("weight has a shard of 0 words: leave it out.")
        if shard.is_meta:
            raise ValueError("weight is on meta, where nothing has a value: load the model's head first.")
    if biases and len(biases) != len(weights):
        raise ValueError(f"bias has {len(biases)} shards but weight has {len(weights)}: split both at the same words.")
    for part, shard in zip(biases, weights, strict=False):
        check_shape("bias", part, (shard.shape[0],), "[V]")
        if part.dtype != shard.dtype:
            raise ValueError(f"bias must be of weight's dtype {shard.dtype}, not {part.dtype}.")
        if part.device != shard.device:
            raise ValueError(f"bias is on {part.device} but its weight is on {shard.device}: move it there first.")
    return weights, biases, sum(shard.shape[0] for shard in weights)


def rows_at_a_time(bytes_per_row: int, multiple: int = 1) -> int:
    """Positions whose logits fit into HELD_BYTES, a multiple of `multiple` where there is room for one."""
    rows = max(1, HELD_BYTES // bytes_per_row)
    return rows // multiple * multiple or rows
