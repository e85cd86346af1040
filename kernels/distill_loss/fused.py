"""The distillation loss with cuBLAS products and one Triton kernel over chunks of logits. See README.md."""

from itertools import accumulate
from typing import Any

import torch
import triton
from torch import Tensor

from retention_gates.kernels.distill_loss.kernel import PARTS
from retention_gates.kernels.distill_loss.logits import ShardLogits, block_of, width_of
from retention_gates.kernels.distill_loss.naive import NO_TARGET, DistillLoss
from retention_gates.kernels.distill_loss.shards import Shards, as_shards, rows_at_a_time


def distill_loss(
    student: Tensor,
    teacher: Tensor | None,
    weight: Shards,
    targets: Tensor,
    *,
    mask: Tensor | None = None,
    bias: Shards | None = None,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    kl_weight: float = 1.0,
    next_token_weight: float = 1.0,
    chunk_size: int | None = None,
) -> DistillLoss:
    """kl_weight * KL(teacher, student) + next_token_weight * cross entropy; arguments as the package's."""
    total, forward_kl, next_token_loss, _ = _distill_loss(
        student,
        None if teacher is None else teacher.detach(),
        [shard.detach() for shard in as_shards(weight)],
        [shard.detach() for shard in as_shards(bias)],
        targets,
        mask,
        float(logit_scale),
        None if softcap is None else float(softcap),
        float(kl_weight),
        float(next_token_weight),
        chunk_size,
        torch.is_grad_enabled() and student.requires_grad,
    )
    return DistillLoss(total, forward_kl.detach(), next_token_loss.detach())


@torch.library.custom_op("retention_gates::distill_loss", mutates_args=())
def _distill_loss(
    student: Tensor,
    teacher: Tensor | None,
    weights: list[Tensor],
    biases: list[Tensor],
    targets: Tensor,
    mask: Tensor | None,
    logit_scale: float,
    softcap: float | None,
    kl_weight: float,
    next_token_weight: float,
    chunk_size: int | None,
    differentiate: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The three losses, and the gradient of N * total for the student: an empty one unless `differentiate`."""
    positions = len(student)
    home, dtype = weights[0].device, weights[0].dtype
    compute = torch.promote_types(dtype, torch.float32)
    targets = targets.to(home)
    has_target = targets != NO_TARGET
    mask = torch.ones_like(has_target) if mask is None else mask.to(home)
    kl_count, target_count = (counted.sum().clamp(min=1).to(compute) for counted in (mask, has_target))
    # The gradient of N * total: that of total, of the order 1 / N, would underflow in fp16.
    kl_factor = mask.to(compute) * (positions * kl_weight / kl_count)  # [N]
    next_token_factor = has_target.to(compute) * (positions * next_token_weight / target_count)

    if chunk_size is None:  # a multiple of the tiles of matrix products
        chunk_size = rows_at_a_time(2 * sum(map(width_of, weights)) * dtype.itemsize, multiple=128)
    chunk_size = max(1, min(chunk_size, positions))
    block = block_of(weights)
    words = list(accumulate(map(len, weights), initial=0))
    splits = list(accumulate((triton.cdiv(len(shard), block) for shard in weights), initial=0))
    parts = weights[0].new_empty(positions, PARTS.value, splits[-1], dtype=compute)
    shards = [
        ShardLogits(
            weight,
            biases[k] if biases else None,
            words[k],
            slice(splits[k], splits[k + 1]),
            parts if weight.device == home else parts.new_empty(parts.shape, device=weight.device),
            [x.to(weight.device) for x in (targets, kl_factor, next_token_factor)],
            chunk_size,
            block=block,
            logit_scale=logit_scale,
            softcap=softcap,
            has_teacher=teacher is not None,
            has_kl=teacher is not None and kl_weight > 0,
        )
        for k, weight in enumerate(weights)
    ]
    gradient = student.new_empty(student.shape if differentiate else 0)
    for start in range(0, positions, chunk_size):
        chunk = slice(start, min(start + chunk_size, positions))
        teacher_chunk = None if teacher is None else teacher[chunk]
        _run_chunk(shards, start, student[chunk], teacher_chunk, gradient[chunk] if differentiate else None)
    del shards  # and with them the logits

    kl_sum, next_token_sum = _sums(parts, mask, has_target, teacher is not None)
    forward_kl, next_token_loss = kl_sum / kl_count, next_token_sum / target_count
    losses = kl_weight * forward_kl + next_token_weight * next_token_loss, forward_kl, next_token_loss
    total, forward_kl, next_token_loss = (x.to(student.device, _dtype_of_losses(student)) for x in losses)
    return total, forward_kl, next_token_loss, gradient


def _run_chunk(
    shards: list[ShardLogits], start: int, student: Tensor, teacher: Tensor | None, gradient: Tensor | None
) -> None:
    """Statistics of the positions from `start` on into parts at home, and their `gradient` [n, C] if there is one."""
    for shard in shards:
        shard.multiply(student, teacher)
    rows = range(len(student))
    if len(shards) == 1 and gradient is not None:
        shards[0].statistics_then_gradient(start, len(rows))
        _hidden_gradient(shards, gradient)
    else:
        for shard in shards:
            shard.launch(start, statistics=rows)
        chunk, parts = slice(start, start + len(rows)), shards[0].parts
        away = [shard for shard in shards if shard.parts is not parts]
        for shard in away:
            parts[chunk, :, shard.splits].copy_(shard.parts[chunk, :, shard.splits])
        if gradient is not None:
            for shard in away:  # a softmax is over all shards
                shard.parts[chunk].copy_(parts[chunk])
            for shard in shards:
                shard.launch(start, gradient=rows)
            _hidden_gradient(shards, gradient)


def _hidden_gradient(shards: list[ShardLogits], out: Tensor) -> None:
    """The chunk's gradient for the student [n, C] into `out`, a sum over shards."""
    first = shards[0]
    if len(shards) == 1:
        if (out.device, out.dtype) == (first.weight.device, first.weight.dtype):
            first.multiply_back(len(out), out)
        else:
            out.copy_(first.multiply_back(len(out)))
        return
    total = torch.zeros(out.shape, dtype=first.parts.dtype, device=first.parts.device)
    for shard in shards:
        total += shard.multiply_back(len(out)).to(total)
    out.copy_(total)


def _sums(parts: Tensor, mask: Tensor, has_target: Tensor, has_teacher: bool) -> tuple[Tensor, Tensor]:
    """Sums of KL over `mask` and of cross entropy over `has_target`, from the statistics of all blocks."""
    maxima, sums, teacher_maxima, teacher_sums, differences, target_logits = parts.unbind(1)  # [N, splits] each
    maximum = maxima.amax(1, keepdim=True)
    log_sum = (sums * (maxima - maximum).exp()).sum(1).log()
    cross_entropy = log_sum - (target_logits.sum(1) - maximum[:, 0])
    next_token_sum = cross_entropy.where(has_target, 0).sum()
    if not has_teacher:
        return torch.zeros_like(next_token_sum), next_token_sum
    teacher_maximum = teacher_maxima.amax(1, keepdim=True)
    weights = (teacher_maxima - teacher_maximum).exp()
    teacher_sum = (teacher_sums * weights).sum(1)
    differences = differences + teacher_sums * ((teacher_maxima - teacher_maximum) - (maxima - maximum))
    divergence = (differences * weights).sum(1) / teacher_sum - teacher_sum.log() + log_sum
    return divergence.where(mask, 0).sum(), next_token_sum


def _dtype_of_losses(student: Tensor) -> torch.dtype:
    return torch.promote_types(student.dtype, torch.float32)


@_distill_loss.register_fake
def _(
    student: Tensor,
    teacher: Any,
    weights: Any,
    biases: Any,
    targets: Any,
    mask: Any,
    scale: Any,
    softcap: Any,
    kl: Any,
    next_token: Any,
    chunk_size: Any,
    differentiate: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    total, forward_kl, next_token_loss = (student.new_empty((), dtype=_dtype_of_losses(student)) for _ in range(3))
    gradient = student.new_empty(student.shape if differentiate else 0)
    return total, forward_kl, next_token_loss, gradient


def _save_gradient(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.save_for_backward(output[3])
    ctx.shards = len(inputs[2]), len(inputs[3])


def _backward(ctx: Any, grad_total: Tensor, *_: Any) -> tuple[Any, ...]:
    (gradient,) = ctx.saved_tensors
    weights, biases = ([None] * count for count in ctx.shards)
    return gradient * (grad_total / len(gradient)), None, weights, biases, *[None] * 8


_distill_loss.register_autograd(_backward, setup_context=_save_gradient)
