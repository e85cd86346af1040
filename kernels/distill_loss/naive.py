"""Distillation loss in plain torch: the reference, and what runs where there is no fused kernel."""

import itertools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

from retention_gates.kernels.distill_loss.shards import Shards, as_shards, rows_at_a_time

NO_TARGET = -100


class DistillLoss(NamedTuple):
    """fp32 scalars; only `total` carries a gradient, and only to the student."""

    total: torch.Tensor
    forward_kl: torch.Tensor
    next_token_loss: torch.Tensor


def _right_when_compiled(function: Callable[..., DistillLoss]) -> Callable[..., DistillLoss]:
    """Keeps the compiler of torch 2.11 off an autograd.Function to which it gives a gradient of 0; 2.13's is right."""
    return function if torch.__version__ >= "2.13" else torch.compiler.disable(function)


@_right_when_compiled
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
    """kl_weight * KL(teacher, student) + next_token_weight * cross entropy; arguments as the package's."""
    head = _Head(as_shards(weight), as_shards(bias), logit_scale, softcap)
    targets = targets.to(head.device)
    has_target = targets != NO_TARGET
    mask = torch.ones_like(has_target) if mask is None else mask.to(head.device)
    if chunk_size is None:  # about 4 fp32 tensors [chunk_size, V] are held
        chunk_size = rows_at_a_time(16 * sum(len(shard) for shard in head.weights))
    differentiate = torch.is_grad_enabled() and student.requires_grad
    arguments = (teacher, head, targets, mask, has_target, kl_weight, next_token_weight, chunk_size, differentiate)
    return DistillLoss(*_DistillLoss.apply(student, *arguments))


class _Head(NamedTuple):
    """The frozen output head: hidden states [n, C] -> fp32 logits [n, V], and a gradient's way back."""

    weights: list[torch.Tensor]
    biases: list[torch.Tensor]
    logit_scale: float
    softcap: float | None

    @property
    def device(self) -> torch.device:
        """Where logits are put together."""
        return self.weights[0].device

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        shards = [
            F.linear(hidden.to(weight.device, weight.dtype), weight, bias).to(self.device)
            for weight, bias in itertools.zip_longest(self.weights, self.biases)
        ]
        logits = torch.cat(shards, dim=-1) if len(shards) > 1 else shards[0]
        # never below fp32, whatever the head's dtype
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32)).mul_(self.logit_scale)
        return logits if self.softcap is None else logits.div_(self.softcap).tanh_().mul_(self.softcap)

    def backward(self, grad: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        """Gradient for the hidden states [n, C], from `grad` for the logits, which is overwritten."""
        if self.softcap is not None:
            grad.mul_(1 - (logits / self.softcap).square_())  # tanh' = 1 - tanh^2
        grad.mul_(self.logit_scale)
        if len(self.weights) == 1:
            return grad.to(self.weights[0].dtype) @ self.weights[0]
        shards = grad.split([len(weight) for weight in self.weights], dim=-1)
        total = grad.new_zeros(len(grad), self.weights[0].shape[1])
        for shard, weight in zip(shards, self.weights, strict=True):
            total += (shard.to(weight.device, weight.dtype) @ weight).to(total)
        return total


class _DistillLoss(torch.autograd.Function):
    """Makes the gradient during forward, so that logits live for one chunk and are computed once."""

    @staticmethod
    def forward(ctx: Any, student: torch.Tensor, *given: Any) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        teacher, head, targets, mask, has_target, kl_weight, next_token_weight, chunk_size, differentiate = given
        dtype = torch.promote_types(torch.promote_types(student.dtype, head.weights[0].dtype), torch.float32)
        kl_sum, next_token_sum = torch.zeros(2, dtype=dtype, device=head.device)
        kl_count, target_count = (counted.sum().clamp(min=1).to(dtype) for counted in (mask, has_target))
        # The gradient of N * total: that of total, of the order 1 / N, would underflow in fp16.
        positions = student.shape[0]
        kl_factor = mask.to(dtype) * (positions * kl_weight / kl_count)  # [N]
        next_token_factor = has_target.to(dtype) * (positions * next_token_weight / target_count)
        gradient = torch.empty_like(student) if differentiate else None

        for start in range(0, positions, chunk_size):
            chunk = slice(start, start + chunk_size)
            logits = head.logits(student[chunk])  # [n, V]
            student_log = logits.log_softmax(-1)
            target = targets[chunk].clamp(min=0)[:, None]
            next_token_sum -= (student_log.gather(1, target)[:, 0] * has_target[chunk]).sum()
            teacher_probability = None
            if teacher is not None:
                teacher_log = head.logits(teacher[chunk]).log_softmax(-1)
                teacher_probability = teacher_log.exp()
                difference = teacher_log.sub_(student_log).mul_(teacher_probability)
                kl_sum += (difference.sum(-1) * mask[chunk]).sum()
            if gradient is not None:
                # d KL / d logits = p_student - p_teacher, d cross entropy / d logits = p_student - one_hot(target)
                kl, next_token = kl_factor[chunk, None], next_token_factor[chunk, None]
                grad = student_log.exp_().mul_(kl + next_token)
                if teacher_probability is not None:
                    grad.sub_(teacher_probability.mul_(kl))
                grad.scatter_add_(1, target, -next_token.to(grad.dtype))
                gradient[chunk] = head.backward(grad, logits)

        forward_kl, next_token_loss = kl_sum / kl_count, next_token_sum / target_count
        total = kl_weight * forward_kl + next_token_weight * next_token_loss
        if gradient is not None:
            ctx.save_for_backward(gradient)
        losses = total, forward_kl, next_token_loss
        dtype = torch.promote_types(student.dtype, torch.float32)
        total, forward_kl, next_token_loss = (loss.to(student.device, dtype) for loss in losses)
        ctx.mark_non_differentiable(forward_kl, next_token_loss)
        return total, forward_kl, next_token_loss

    @staticmethod
    def backward(ctx: Any, grad_total: torch.Tensor, *_: Any) -> Any:
        (gradient,) = ctx.saved_tensors
        return gradient * (grad_total / gradient.shape[0]), *[None] * 9
