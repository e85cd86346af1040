"""Forward KL and next-token loss through a frozen output head, without the logits. See README.md in this folder."""

import torch

from retention_gates.kernels.checks import check_same_device, check_shape
from retention_gates.kernels.distill_loss import naive
from retention_gates.kernels.distill_loss.naive import NO_TARGET, DistillLoss

__all__ = ["NO_TARGET", "DistillLoss", "distill_loss"]


def distill_loss(
    student: torch.Tensor,
    teacher: torch.Tensor | None,
    weight: torch.Tensor,
    targets: torch.Tensor,
    *,
    mask: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    kl_weight: float = 1.0,
    next_token_weight: float = 1.0,
    chunk_size: int = 1024,
) -> DistillLoss:
    """kl_weight * KL(teacher, student) + next_token_weight * cross entropy, each a mean over the positions it counts.

    Logits are softcap(logit_scale * (x W^T + b)), made and used up one chunk of positions at a time; the softmax is in
    fp32. `total` gives a gradient to `student` and to nothing else, made in the forward pass; the two terms are
    detached and unweighted. A term of weight 0 is still reported if it can be, else 0.

    Args:
        student: last hidden states [N, C], after the final norm.
        teacher: as `student`, with the gates off. None only with kl_weight = 0.
        weight: [V, C], the frozen output head.
        targets: int64 [N], the next token; -100 where there is none.
        mask: bool [N], the positions that KL counts. None: all.
        bias: [V].
        softcap: final logits become softcap * tanh(logits / softcap).
        chunk_size: positions at a time; about 4 * chunk_size * V * 4 bytes are held.

    Raises:
        ValueError: for shapes, dtypes or devices that don't go together, targets outside the vocabulary, and a term
            with a weight but no position to count.
    """
    if student.ndim != 2 or not student.is_floating_point():
        raise ValueError(
            f"student must be floating [N, C], not {student.dtype} {list(student.shape)}: flatten the batch."
        )
    positions, hidden_size = student.shape
    vocabulary = weight.shape[0]
    check_shape("weight", weight, (vocabulary, hidden_size), "[V, C]")
    check_shape("targets", targets, (positions,), "[N]")
    if targets.dtype != torch.int64:
        raise ValueError(f"targets must be torch.int64, not {targets.dtype}: convert them with .long().")
    if teacher is not None:
        check_shape("teacher", teacher, (positions, hidden_size), "[N, C]")
    if mask is not None:
        check_shape("mask", mask, (positions,), "[N]")
        if mask.dtype != torch.bool:
            raise ValueError(f"mask must be torch.bool, not {mask.dtype}: convert it with .bool().")
    if bias is not None:
        check_shape("bias", bias, (vocabulary,), "[V]")
        if bias.dtype != weight.dtype:
            raise ValueError(f"bias must be of weight's dtype {weight.dtype}, not {bias.dtype}.")
    check_same_device("student", student, teacher=teacher, weight=weight, targets=targets, mask=mask, bias=bias)
    if softcap is not None and not softcap > 0:
        raise ValueError(f"softcap must be above 0, not {softcap}: pass None for no cap.")
    if chunk_size < 1:
        raise ValueError(f"chunk_size must be at least 1 position, not {chunk_size}.")
    for name, value in (("kl_weight", kl_weight), ("next_token_weight", next_token_weight)):
        if not value >= 0:
            raise ValueError(f"{name} must be 0 or more, not {value}.")
    _check_positions(teacher, targets, mask, vocabulary, kl_weight, next_token_weight)
    return naive.distill_loss(
        student,
        teacher,
        weight,
        targets,
        mask=mask,
        bias=bias,
        logit_scale=logit_scale,
        softcap=softcap,
        kl_weight=kl_weight,
        next_token_weight=next_token_weight,
        chunk_size=chunk_size,
    )


def _check_positions(
    teacher: torch.Tensor | None,
    targets: torch.Tensor,
    mask: torch.Tensor | None,
    vocabulary: int,
    kl_weight: float,
    next_token_weight: float,
) -> None:
    if kl_weight > 0 and teacher is None:
        raise ValueError(f"teacher is None but kl_weight is {kl_weight}: pass its hidden states, or kl_weight=0.")
    if torch.compiler.is_compiling():
        return  # what follows looks at values
    has_target = targets != NO_TARGET
    outside = targets[has_target & ((targets < 0) | (targets >= vocabulary))]
    if outside.numel():
        raise ValueError(
            f"targets holds {outside[0].item()}: allowed are 0..{vocabulary - 1}, and {NO_TARGET} for none."
        )
    if next_token_weight > 0 and not bool(has_target.any()):
        raise ValueError(
            f"targets are all {NO_TARGET}, a row with no target: leave such rows out, or set next_token_weight=0."
        )
    if kl_weight > 0 and (targets.numel() == 0 if mask is None else not bool(mask.any())):
        raise ValueError("mask leaves forward_kl no position to count: leave such rows out, or set kl_weight=0.")
