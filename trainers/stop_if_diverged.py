"""Stops a run that has gone wrong, before it saves what it has become."""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import nn
from torch.nn.utils import get_total_norm
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from retention_gates.kernels.checks import LogBetaError
from retention_gates.trainers.checkpoint import checkpoints_in
from retention_gates.trainers.distributed.sharding import whole

LOSSES = ("loss", "grad_norm", "forward_kl", "next_token_loss", "layer_error", "capacity_loss")


class TrainingDiverged(ValueError):
    """The loss is no number any more, or far worse than it was; names the last good checkpoint."""


def check_progress(
    step: int, logs: dict[str, float], history: list[dict[str, Any]], *, ratio: float, output_dir: Path
) -> None:
    """Raises TrainingDiverged for a loss or a norm of the gradient that is not finite, or a loss that has run away.

    A loss has run away when it is above `ratio` times the lowest one logged before and also worse than the first.
    Every checkpoint is written after its step was logged, so that none holds what is found here. The parts of the loss
    are looked at, too: `logging_nan_inf_filter` leaves them as they are.
    """
    for name in LOSSES:
        if name in logs and not math.isfinite(logs[name]):
            raise diverged(f"{name} is {logs[name]}", step, output_dir)
    losses = [line["loss"] for line in history if "loss" in line]
    if losses and logs["loss"] > max(losses[0], ratio * min(losses)):
        raise diverged(f"the loss is {logs['loss']:.4g} and was {min(losses):.4g}", step, output_dir)


def check_update(
    step: int, losses: Sequence[float], history: list[dict[str, Any]], *, ratio: float, output_dir: Path
) -> None:
    """Raises TrainingDiverged if the step's update has ruined the gates, which its own loss does not show.

    Args:
        losses: of the same rows, with the gates before and after the update.
    """
    before, after = losses
    first = next((line["loss"] for line in history if "loss" in line), before)
    if not math.isfinite(after) or after > max(first, ratio * before):
        raise diverged(f"the update made a loss of {after:.4g} out of {before:.4g}", step, output_dir)


class FiniteGradients(TrainerCallback):
    """Stops a run before the optimizer takes a gradient that is no number, whatever is logged of it.

    A scaler of fp16 meets such gradients as a matter of course and skips the step itself.
    """

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        gradients = [p.grad for p in kwargs["model"].parameters() if p.grad is not None]
        if args.fp16 or not gradients:
            return
        norm = whole(get_total_norm(gradients)).item()
        if not math.isfinite(norm):
            raise diverged(f"the gradient's norm is {norm}", state.global_step + 1, Path(str(args.output_dir)))


@contextmanager
def naming_divergence(model: nn.Module, step: int, output_dir: Path) -> Iterator[None]:
    """Raises TrainingDiverged in place of what gates without numbers, or with far too large ones, lead to."""
    try:
        yield
    except ValueError as error:
        is_finite = all(bool(gate.isfinite().all()) for gate in model.parameters() if gate.requires_grad)
        if is_finite and not isinstance(error, LogBetaError):
            raise
        what = "gates give no numbers" if is_finite else "gates are no numbers"
        raise diverged(what, step, output_dir) from error


def diverged(what: str, step: int, output_dir: Path) -> TrainingDiverged:
    checkpoints = checkpoints_in(output_dir)
    last = f"The last good checkpoint is {checkpoints[-1]}" if checkpoints else "No checkpoint had been written before"
    return TrainingDiverged(
        f"At step {step} {what}: the run stops. {last}. Look at the losses in log.jsonl, and start anew in another "
        "output_dir with a lower learning_rate, more warmup_steps or a smaller max_grad_norm."
    )
