"""Reports a run's progress: a progress line, log.jsonl, and averages over the steps between two logs."""

import json
import math
import os
import time
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from transformers import ProgressCallback, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from retention_gates.gates.adapter.gate_outputs import Recording
from retention_gates.gates.adapter.model import RetentionGateModel
from retention_gates.trainers.losses import CapacityLoss
from retention_gates.trainers.phases import MEMORY, TIME

LOG_NAME = "log.jsonl"
# How the names begin of what two equal runs log differently, because it depends on clock and machine.
UNREPEATABLE = (
    "tokens_per_second",
    "train_runtime",
    "train_samples_per_second",
    "train_steps_per_second",
    TIME,
    MEMORY,
)
PER_LAYER = "retained_mass/layer_"  # scalars by the dozen: for tensorboard and log.jsonl, not for the progress line


class LogWhenSaving(TrainerCallback):
    """Every checkpoint ends a logging window, so that averages logged after a resume are those of an unbroken run."""

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        control.should_log = control.should_log or control.should_save

    on_epoch_end = on_step_end


class ProgressLine(ProgressCallback):
    """transformers' progress bar, without what is logged per layer."""

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        hidden = (PER_LAYER, TIME, MEMORY)
        shown = {name: value for name, value in (logs or {}).items() if not name.startswith(hidden)}
        super().on_log(args, state, control, logs=shown, **kwargs)


class JsonLinesLog(TrainerCallback):
    """Appends every log to log.jsonl, one object a line, numbers in full precision."""

    def __init__(self, output_dir: Path):
        self.path = output_dir / LOG_NAME

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Drops what a killed run logged after the checkpoint that this one starts from."""
        if not state.is_world_process_zero or not self.path.exists():
            return
        kept = []
        for line in self.path.read_text(encoding="utf-8").splitlines():
            try:
                if json.loads(line)["step"] <= state.global_step:
                    kept.append(line + "\n")
            except json.JSONDecodeError:
                break  # the line that was being written when the process died
        temporary = self.path.with_name(f".{LOG_NAME}.new")  # a full disk or a kill leaves the log as it was
        temporary.write_text("".join(kept) if state.global_step else "", encoding="utf-8")
        os.replace(temporary, self.path)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        if state.is_world_process_zero:
            with self.path.open("a", encoding="utf-8") as log:
                log.write(json.dumps({"step": state.global_step, **(logs or {})}) + "\n")


@torch.no_grad()
def describe(gated: RetentionGateModel, recording: Recording, capacity: CapacityLoss) -> dict[str, torch.Tensor]:
    """Mean retained mass, overall and per layer, in tokens, and the mean log of the half-life in tokens."""
    terms = {"retained_mass": capacity.retained_mass.mean()}
    for layer, mass in zip(gated.gated_layers, capacity.retained_mass, strict=True):
        terms[f"{PER_LAYER}{layer.base_layer.layer_idx:02d}"] = mass
    log_beta = torch.stack([layer.to(recording.log_beta[0].device) for layer in recording.log_beta])
    decays = log_beta < 0
    logs = (-log_beta).clamp(min=torch.finfo(log_beta.dtype).tiny).log() * decays
    terms["log_half_life"] = math.log(math.log(2.0)) - logs.sum() / decays.sum().clamp(min=1)
    return terms


class Averages:
    """Means over forward passes of scalars that stay on their device until they are asked for."""

    def __init__(self) -> None:
        self._sums: dict[str, torch.Tensor] = {}
        self._count = 0
        self._tokens = 0
        self._began = 0.0

    def add(self, terms: dict[str, torch.Tensor], tokens: int) -> None:
        """Args: terms: fp32 scalars, detached. tokens: of this forward pass on this rank."""
        for name, value in terms.items():
            self._sums[name] = self._sums[name] + value if name in self._sums else value
        self._count += 1
        self._tokens += tokens

    def start_clock(self) -> None:
        """Called before each forward pass: the first one after a log starts the window, so that saves don't count."""
        if self._count == 0:
            self._began = time.monotonic()

    def drain(self, accelerator: Accelerator) -> dict[str, float]:
        """The means over all ranks since the last call, and tokens per second."""
        if self._count == 0:
            return {}
        values = torch.stack(list(self._sums.values())) / self._count
        means = dict(zip(self._sums, accelerator.reduce(values, reduction="mean").tolist(), strict=True))
        means["tokens_per_second"] = self._tokens * accelerator.num_processes / (time.monotonic() - self._began)
        self._sums, self._count, self._tokens = {}, 0, 0
        return means
