"""The layout of a run over processes, the parts of it that must stay the same, and checks of the launch."""

import logging
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from transformers import TrainingArguments

if TYPE_CHECKING:
    from retention_gates.trainers.config import RetentionTrainingArguments

ON_CPUS = "without GPUs, start it with torchrun --nproc_per_node N and set training.use_cpu=true (both are needed)"

logger = logging.getLogger(__name__)


def check_launch(wanted: int | None, ranks: int) -> None:
    """Raises ValueError if the launcher was asked for more processes than there are.

    `accelerate launch --cpu --num_processes 2` starts one process without a word; it gives itself away by telling that
    process where to meet the others, but not how many they are.

    Args:
        wanted: processes that the run's file asks for; None: any number.
        ranks: processes that there are.
    """
    if ranks == 1 and "MASTER_PORT" in os.environ and "WORLD_SIZE" not in os.environ:
        raise ValueError(
            "The launcher was asked for several processes and started this one alone, as accelerate launch does on a "
            f"CPU: {ON_CPUS}, or start one process, with accelerate launch --num_processes 1."
        )
    started = started_ranks()
    if started not in (1, ranks):
        raise ValueError(
            f"The launcher started {started} processes, but each of them would run alone, as they do where the engine "
            f"they are launched for finds no accelerator: launch on GPUs; {ON_CPUS}."
        )
    if wanted is not None and wanted != ranks:
        raise ValueError(
            f"ranks={wanted} processes are asked for and {ranks} run: start them with torchrun or accelerate launch "
            f"--num_processes {wanted}, or set ranks to {ranks} or leave it out; {ON_CPUS}."
        )


def check_devices(use_cpu: bool) -> None:
    """Raises ValueError, before anything is set up, for more processes than GPUs."""
    here, gpus = int(os.environ.get("LOCAL_WORLD_SIZE", 1)), torch.cuda.device_count()
    if not use_cpu and 0 < gpus < here:
        raise ValueError(
            f"{here} processes were started on a machine with {gpus} GPUs: launch with --num_processes {gpus} (for "
            "each machine), or with use_cpu."
        )


def started_ranks() -> int:
    """Processes that the launcher says it has started."""
    return int(os.environ.get("WORLD_SIZE", 1))


def accumulation_steps(rows_per_step: int, rows_per_pass: int, ranks: int) -> int:
    """Forward passes of each rank per optimiser step, so that all ranks together see `rows_per_step` rows.

    With rows split over ranks, `ranks` are the groups that share rows.

    Raises:
        ValueError: if that is no whole number.
    """
    steps, left = divmod(rows_per_step, rows_per_pass * ranks)
    if left or steps < 1:
        near = max(1, round(rows_per_step / (rows_per_pass * ranks))) * rows_per_pass * ranks
        raise ValueError(
            f"rows_per_step={rows_per_step} rows can't be divided among {ranks} ranks with "
            f"per_device_train_batch_size={rows_per_pass}: choose a multiple of {rows_per_pass * ranks}, such as "
            f"{near}."
        )
    return steps


def engine_of(args: TrainingArguments) -> str:
    """Names what holds the optimiser's state: "deepspeed", "fsdp", or "replicated" where every rank has all of it."""
    if args.deepspeed or os.environ.get("ACCELERATE_USE_DEEPSPEED", "").lower() == "true":
        return "deepspeed"
    if args.fsdp or os.environ.get("ACCELERATE_USE_FSDP", "").lower() == "true":
        return "fsdp"
    return "replicated"


def check_engine(args: TrainingArguments, accelerator: Accelerator) -> None:
    """Raises ValueError if the engine that the launcher asked for is not the one that runs, or cannot train gates."""
    wanted, runs = engine_of(args), accelerator.distributed_type
    expected = {"deepspeed": DistributedType.DEEPSPEED, "fsdp": DistributedType.FSDP}.get(wanted, runs)
    if runs != expected:
        raise ValueError(
            f"{wanted} was asked for, but Accelerate runs {runs.value}, as it does on a CPU and with one process "
            "without a word: launch on GPUs, without use_cpu, or choose another file of recipes/runs/accelerate."
        )
    if wanted == "fsdp":
        if not accelerator.is_fsdp2:
            raise ValueError("FSDP 1 flattens frozen weights and gates together: set fsdp_version: 2.")
        if accelerator.mixed_precision != "no":
            raise ValueError(
                f"mixed_precision={accelerator.mixed_precision!r} with FSDP would compute the gates in it, and they "
                "need fp32: set mixed_precision: 'no' and choose the base's type with model.dtype."
            )
        if getattr(args, "objective", "end_to_end") == "layerwise":
            raise ValueError(
                "objective='layerwise' sends no gradient through the layers, on which FSDP waits to gather them for "
                "the backward pass: use DDP or ZeRO-2, whose base is whole on every rank."
            )


def run_facts(args: "RetentionTrainingArguments", base_model: str | None) -> dict[str, Any]:
    """Gives the facts that a checkpoint notes of the run that wrote it.

    Row i of a run is the same whoever computes it, and step s takes the rows from s * rows_per_step on, so that a
    resumed run sees the same rows in the same order as long as rows_per_step and seed stay the same.
    """
    rows = args.train_batch_size * args.gradient_accumulation_steps * args.row_groups
    return {
        "ranks": args.world_size,
        "ranks_per_row": args.ranks_per_row,
        "rows_per_step": rows,
        "seed": args.seed,
        "engine": engine_of(args),
        "base_model": base_model,
    }


def check_same_run(checkpoint: Path, manifest: dict[str, Any], facts: dict[str, Any]) -> None:
    """Raises ValueError unless the run can go on from the checkpoint; says what is different on other ranks."""
    for name in ("rows_per_step", "seed", "engine", "base_model"):
        if manifest[name] != facts[name]:
            raise ValueError(
                f"{checkpoint} was written with {name} = {manifest[name]}, now it is {facts[name]}: the run would not "
                "be the same one. Resume as it was started, or start anew in another output_dir."
                + _same_rows(manifest, facts, name)
            )
    before, now = manifest["ranks"], facts["ranks"]
    to_a_row = [of.get("ranks_per_row", 1) for of in (manifest, facts)]  # older manifests do not have it
    if before == now and to_a_row[0] == to_a_row[1]:
        return
    if facts["engine"] == "deepspeed" and before != now:
        raise ValueError(
            f"{checkpoint} was written by {before} ranks, each with its part of DeepSpeed's state, now there are "
            f"{now}: resume on {before}, or start anew in another output_dir."
        )
    logger.warning(
        "%s was written by %s ranks%s, now there are %s%s. Steps see the same rows in the same order. What changes: "
        "which rank computes a row, the order in which sums over ranks are rounded, and the state of the random "
        "number generators, which the objective does not use.",
        *(checkpoint, before, _shared(to_a_row[0]), now, _shared(to_a_row[1])),
    )


def _same_rows(manifest: dict[str, Any], facts: dict[str, Any], name: str) -> str:
    if name != "rows_per_step" or manifest["ranks"] == facts["ranks"]:
        return ""
    return f" On {facts['ranks']} ranks, training.rows_per_step={manifest['rows_per_step']} keeps the rows of a step."


def _shared(ranks_per_row: int) -> str:
    return f" ({ranks_per_row} to a row)" if ranks_per_row > 1 else ""
