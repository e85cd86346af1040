"""Forward KL and next-token loss through a frozen output head, without the logits. See README.md in this folder."""

import torch

from retention_gates.kernels.checks import check_same_device, check_shape, may_look_at_values
from retention_gates.kernels.dispatch import use_fused
from retention_gates.kernels.distill_loss import naive
from retention_gates.kernels.distill_loss.naive import NO_TARGET, DistillLoss
from retention_gates.kernels.distill_loss.shards import Shards, check_head

__all__ = ["NO_TARGET", "DistillLoss", "distill_loss"]

WORTH_A_COPY = 7 / 8  # share of positions that are counted, up to which hidden states are copied to skip the others


def distill_loss(
    student: torch.Tensor,
    teacher: torch.Tensor | None,
    weight: Shards,
    targets: torch.Tensor,
    *,
    mask: torch.Tensor | None = None,
    bias: Shards | None = None,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    kl_weight: float = 1.0,
    next_token_weight: float = 1.0,
    chunk_size: int | None = None,
) -> DistillLoss:
    """kl_weight * KL(teacher, student) + next_token_weight * cross entropy, each a mean over the positions it counts.

    Logits are softcap(logit_scale * (x W^T + b)), made and used up one chunk of positions at a time; the softmax is in
    fp32. `total` gives a gradient to `student` and to nothing else, made in the forward pass; the two terms are
    detached and unweighted. A term of weight 0 is still reported if it can be, else 0.

    Args:
        student: last hidden states [N, C], after the final norm.
        teacher: as `student`, with the gates off. None only with kl_weight = 0.
        weight: [V, C], the frozen output head; or its shards [V_k, C] in order, each on a device of its own. The head
            may lie on other devices than the hidden states, which are moved to it and the gradient back.
        targets: int64 [N], the next token; -100 where there is none.
        mask: bool [N], the positions that KL counts. None: all.
        bias: [V], or shards like weight's.
        softcap: final logits become softcap * tanh(logits / softcap).
        chunk_size: positions at a time. None: as many as keep the logits held below 0.9 GiB.

    Raises:
        ValueError: for shapes, dtypes or devices that don't go together, targets outside the vocabulary, and a term
            with a weight but no position to count.
    """
    if student.ndim != 2 or not student.is_floating_point():
        raise ValueError(
            f"student must be floating [N, C], not {student.dtype} {list(student.shape)}: flatten the batch."
        )
    positions, hidden_size = student.shape
    weights, biases, vocabulary = check_head(weight, bias, hidden_size)
    check_shape("targets", targets, (positions,), "[N]")
    if targets.dtype != torch.int64:
        raise ValueError(f"targets must be torch.int64, not {targets.dtype}: convert them with .long().")
    if teacher is not None:
        check_shape("teacher", teacher, (positions, hidden_size), "[N, C]")
    if mask is not None:
        check_shape("mask", mask, (positions,), "[N]")
        if mask.dtype != torch.bool:
            raise ValueError(f"mask must be torch.bool, not {mask.dtype}: convert it with .bool().")
    check_same_device("student", student, teacher=teacher, targets=targets, mask=mask)
    if softcap is not None and not softcap > 0:
        raise ValueError(f"softcap must be above 0, not {softcap}: pass None for no cap.")
    if chunk_size is not None and chunk_size < 1:
        raise ValueError(f"chunk_size must be at least 1 position, not {chunk_size}.")
    for name, value in (("kl_weight", kl_weight), ("next_token_weight", next_token_weight)):
        if not value >= 0:
            raise ValueError(f"{name} must be 0 or more, not {value}.")
    if kl_weight > 0 and teacher is None:
        raise ValueError(f"teacher is None but kl_weight is {kl_weight}: pass its hidden states, or kl_weight=0.")
    if may_look_at_values(targets):
        counted = _check_positions(targets, mask, vocabulary, kl_weight, next_token_weight)
        if mask is not None and 0 < counted <= WORTH_A_COPY * positions:
            # positions that no term counts come last in this order: no logits are made for them
            kept = ((targets == NO_TARGET) & ~mask).to(torch.uint8).argsort(stable=True)[:counted]
            student, targets, mask = student.index_select(0, kept), targets[kept], mask[kept]
            teacher = None if teacher is None else teacher.detach().index_select(0, kept)
    form = naive.distill_loss
    if all([use_fused("distill_loss", shard) for shard in weights]):  # noqa: C419  each says which form runs
        from retention_gates.kernels.distill_loss.fused import distill_loss as form
    return form(
        student,
        teacher,
        weights,
        targets,
        mask=mask,
        bias=biases,
        logit_scale=logit_scale,
        softcap=softcap,
        kl_weight=kl_weight,
        next_token_weight=next_token_weight,
        chunk_size=chunk_size,
    )


def _check_positions(
    targets: torch.Tensor, mask: torch.Tensor | None, vocabulary: int, kl_weight: float, next_token_weight: float
) -> int:
    """Positions that some term counts. One read from the device, unless it has to say what is wrong."""
    has_target = targets != NO_TARGET
    allowed = ~has_target | ((targets >= 0) & (targets < vocabulary))
    in_kl = torch.ones_like(has_target) if mask is None else mask
    numbers = torch.stack([x.sum() for x in (~allowed, has_target, in_kl, has_target | in_kl)]).tolist()
    outside, with_target, with_kl, counted = numbers
    if outside:
        raise ValueError(
            f"targets holds {targets[~allowed][0].item()}: allowed are 0..{vocabulary - 1}, and {NO_TARGET} for none."
        )
    if next_token_weight > 0 and not with_target:
        raise ValueError(
            f"targets are all {NO_TARGET}, a row with no target: leave such rows out, or set next_token_weight=0."
        )
    if kl_weight > 0 and not with_kl:
        raise ValueError("mask leaves forward_kl no position to count: leave such rows out, or set kl_weight=0.")
    return counted
