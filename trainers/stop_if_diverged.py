"""Stops a run that has gone wrong, before it saves what it has become."""

import math
from pathlib import Path
from typing import Any

from retention_gates.trainers.checkpoint import checkpoints_in


class TrainingDiverged(ValueError):
    """The loss is no number any more, or far worse than it was; names the last good checkpoint."""


def check_progress(
    step: int, logs: dict[str, float], history: list[dict[str, Any]], *, ratio: float, output_dir: Path
) -> None:
    """Raises TrainingDiverged for a loss or a norm of the gradient that is not finite, or a loss that has run away.

    A loss has run away when it is above `ratio` times the lowest one logged before and also worse than the first.
    Every checkpoint is written after its step was logged, so that none holds what is found here.
    """
    for name in ("loss", "grad_norm"):
        if name in logs and not math.isfinite(logs[name]):
            raise diverged(f"{name} is {logs[name]}", step, output_dir)
    losses = [line["loss"] for line in history if "loss" in line]
    if losses and logs["loss"] > max(losses[0], ratio * min(losses)):
        raise diverged(f"the loss is {logs['loss']:.4g} and was {min(losses):.4g}", step, output_dir)


def diverged(what: str, step: int, output_dir: Path) -> TrainingDiverged:
    checkpoints = checkpoints_in(output_dir)
    last = f"The last good checkpoint is {checkpoints[-1]}" if checkpoints else "No checkpoint had been written before"
    return TrainingDiverged(
        f"At step {step} {what}: the run stops. {last}. Look at the losses in log.jsonl, and start anew in another "
        "output_dir with a lower learning_rate, more warmup_steps or a smaller max_grad_norm."
    )
