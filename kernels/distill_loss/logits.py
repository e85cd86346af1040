"""Logits of one chunk of positions over one shard of the vocabulary, on the shard's device, made and used in place."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from retention_gates.kernels.distill_loss.kernel import pass_over_logits

# Words of student and teacher that a program holds in registers; chosen by recipes/bench/distill_loss.py --sweep.
BLOCK = 4096
WARPS = 4


def block_of(weights: list[Tensor]) -> int:
    """Words per program: one size for all shards."""
    return min(BLOCK, max(16, triton.next_power_of_2(max(map(len, weights)))))


def width_of(weight: Tensor) -> int:
    """Elements from one row of logits to the next: rows start on full cache lines whatever V is."""
    return triton.cdiv(len(weight), 64) * 64


class ShardLogits:
    """Two buffers [rows, width], student's and teacher's, that every chunk reuses.

    Args:
        first_word: index in the vocabulary of the shard's first word.
        splits: which blocks of words, of those of all shards, are the shard's.
        parts: [N, PARTS, splits of all shards], on the shard's device.
        per_position: targets, and what the gradients of KL and cross entropy are multiplied by, [N] each.
    """

    def __init__(
        self,
        weight: Tensor,
        bias: Tensor | None,
        first_word: int,
        splits: slice,
        parts: Tensor,
        per_position: list[Tensor],
        rows: int,
        *,
        block: int,
        logit_scale: float,
        softcap: float | None,
        has_teacher: bool,
        has_kl: bool,
    ):
        self.weight, self.bias, self.first_word, self.splits = weight, bias, first_word, splits
        self.parts, self.per_position = parts, per_position
        self.width = width_of(weight)
        self.student = weight.new_empty(rows, self.width)
        self.teacher = weight.new_empty(rows, self.width) if has_teacher else None
        # as tensors: a float argument of a kernel is fp32
        self.scalars = tuple(parts.new_full((1,), 1.0 if x is None else x) for x in (logit_scale, softcap))
        self.block = block
        self.options = dict(
            HAS_TEACHER=has_teacher,
            HAS_KL=has_kl,
            HAS_BIAS=bias is not None,
            HAS_SOFTCAP=softcap is not None,
            COMPUTE=tl.float64 if parts.dtype == torch.float64 else tl.float32,
            BLOCK=block,
            SPLITS=triton.next_power_of_2(parts.shape[2]),
            num_warps=2 * WARPS if weight.element_size() == 4 else WARPS,  # else fp32 with a softcap spills
        )

    def multiply(self, student: Tensor, teacher: Tensor | None) -> None:
        """Products of the chunk's hidden states [n, C] with the head."""
        for hidden, buffer in ((student, self.student), (teacher, self.teacher)):
            if hidden is not None:
                assert buffer is not None
                hidden = hidden.to(self.weight.device, self.weight.dtype)
                torch.mm(hidden, self.weight.t(), out=buffer[: len(hidden), : len(self.weight)])

    def launch(self, first_row: int, *, gradient: range = range(0), statistics: range = range(0)) -> None:
        """Statistics of some of the chunk's rows into parts, and the gradient of others in place of student's logits.

        first_row is the position of the chunk's row 0.
        """
        own_splits = self.splits.stop - self.splits.start
        with torch.cuda.device_of(self.student):
            pass_over_logits[(own_splits * (len(gradient) + len(statistics)),)](
                self.student,
                self.teacher,
                self.bias,
                self.parts,
                *self.per_position,
                first_row,
                self.first_word,
                self.splits.start,
                own_splits,
                self.parts.shape[2],
                gradient.start,
                len(gradient),
                statistics.start,
                len(self.weight),
                self.width,
                *self.scalars,
                **self.options,
            )

    def statistics_then_gradient(self, first_row: int, rows: int) -> None:
        """Statistics, then the gradient, of rows 0 .. rows - 1."""
        self.launch(first_row, statistics=range(rows))
        self.launch(first_row, gradient=range(rows))

    def multiply_back(self, rows: int, out: Tensor | None = None) -> Tensor:
        """The gradient for the hidden states [rows, C], once student's logits are their gradient."""
        gradient = self.student[:rows, : len(self.weight)]
        return torch.mm(gradient, self.weight) if out is None else torch.mm(gradient, self.weight, out=out)
