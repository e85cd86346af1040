"""Measures what a second GPU brings: training on one and on two, over NCCL, started by accelerate launch.

    python recipes/bench/train_ranks.py --case scaling                # rows of 16,384 tokens, one per GPU
    python recipes/bench/train_ranks.py --case scaling --file zero2   # with recipes/runs/accelerate/zero2.yaml
    python recipes/bench/train_ranks.py --case split                  # one row of 65,536 tokens that two GPUs share

Random weights in Qwen3-4B's shape, bf16, gradient checkpointing, through RetentionTrainer.train(). Tokens per second
are those of the median step after those that compile; the limit of "scaling" is twice what one GPU does, and
the goal 0.95 of it. "split" tells seconds and peak memory of a GPU, and as error how far the loss of the first step is
from the one that a single GPU finds for the whole row, relative to it.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from itertools import pairwise
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import torch
from transformers import TrainerCallback

from retention_gates.recipes.bench.harness import Measurement, report
from retention_gates.recipes.bench.train import RandomRows, say
from retention_gates.recipes.bench.train_step import SHAPE, make_model
from retention_gates.trainers.config import RetentionTrainingArguments
from retention_gates.trainers.trainer import RetentionTrainer

RECIPES = Path(__file__).resolve().parent.parent
TOKENS = {"scaling": 16_384, "split": 65_536}
FIRST_STEPS = {"scaling": 2, "split": 1}  # which compile
STEPS = {"scaling": 6, "split": 1}  # timed


class StepTimes(TrainerCallback):
    """When the device was done with each step, on the monotonic clock."""

    def __init__(self) -> None:
        self.ends: list[float] = []

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        torch.cuda.synchronize()
        self.ends.append(time.monotonic())
        say(f"step {len(self.ends)}")


def train(case: str, tokens: int, layers: int, found: Path) -> None:
    """One rank's training; the first rank writes to `found` what it saw."""
    torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
    steps = FIRST_STEPS[case] + STEPS[case]
    with tempfile.TemporaryDirectory() as folder:
        arguments = RetentionTrainingArguments(
            output_dir=folder,
            max_steps=steps,
            memory_size=512,
            per_device_train_batch_size=1,
            logging_steps=1,
            report_to=[],
            save_strategy="no",
            disable_tqdm=True,
        )
        torch.manual_seed(0)  # every rank the same weights
        model = make_model("cuda", torch.bfloat16, num_hidden_layers=layers, max_position_embeddings=tokens, **SHAPE)
        rows = RandomRows(steps * arguments.row_groups, tokens, SHAPE["vocab_size"])
        times = StepTimes()
        trainer = RetentionTrainer(model, arguments, rows, callbacks=[times])
        trainer.train()
    if arguments.process_index == 0:
        peak = torch.cuda.max_memory_allocated() / 2**20
        timed = times.ends[FIRST_STEPS[case] - 1 :]  # from the end of the last that compiles
        seconds = [after - before for before, after in pairwise(timed)]
        seen = {"seconds": seconds, "peak_mib": peak, "loss": trainer.state.log_history[0]["loss"]}
        found.write_text(json.dumps(seen | {"ranks": arguments.world_size}), encoding="utf-8")


def launched(file: str, ranks: int, *arguments: str) -> dict[str, Any]:
    """Runs `ranks` processes and gives what the first of them saw, started with a file of recipes/runs/accelerate."""
    say(f"{ranks} with {file}.yaml")
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes", str(ranks)]
    launch += ["--config_file", str(RECIPES / "runs" / "accelerate" / f"{file}.yaml"), "--main_process_port", "0"]
    with tempfile.TemporaryDirectory() as folder:
        found = Path(folder) / "found.json"
        # deepspeed's settings are named relative to the repository
        subprocess.run([*launch, __file__, *arguments, "--found", str(found)], check=True, cwd=RECIPES.parent)
        seen: dict[str, Any] = json.loads(found.read_text(encoding="utf-8"))
    assert seen["ranks"] == ranks
    return seen


def scaling(file: str, tokens: int, *arguments: str) -> list[Measurement]:
    """Tokens per second of one GPU and of two with a row each."""
    measured: list[Measurement] = []
    for ranks in (1, 2):
        seen = launched("one_gpu" if ranks == 1 else file, ranks, *arguments)
        rates = [ranks * tokens / seconds for seconds in seen["seconds"]]
        low, _, high = quantiles(rates, n=4)
        limit = 2 * measured[0].value if measured else None
        name = f"{ranks} GPU" + (f"s, {file}.yaml" if ranks > 1 else "")
        case = f"a row of {tokens} tokens on each GPU"
        measured.append(Measurement(case, name, median(rates), "tokens/s", high - low, limit, seen["peak_mib"]))
    return measured


def split(tokens: int, *arguments: str) -> list[Measurement]:
    """Seconds of a step on one row, whole on one GPU and shared by two."""
    case = f"a row of {tokens} tokens"
    whole = launched("one_gpu", 1, *arguments)
    halves = launched("ulysses", 2, *arguments)
    error = abs(halves["loss"] - whole["loss"]) / whole["loss"]
    return [
        Measurement(case, "1 GPU", median(whole["seconds"]), "s", None, None, whole["peak_mib"]),
        Measurement(case, "2 GPUs share it", median(halves["seconds"]), "s", None, None, halves["peak_mib"], error),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case", choices=TOKENS, required=True)
    parser.add_argument("--file", choices=("ddp", "zero2"), default="ddp", help="of scaling (default: %(default)s)")
    parser.add_argument("--tokens", type=int, help="of a row (default: 16,384 for scaling, 65,536 for split)")
    parser.add_argument("--layers", type=int, default=36, help="(default: %(default)s)")
    parser.add_argument("--found", type=Path, help=argparse.SUPPRESS)  # in the processes that are launched
    options = parser.parse_args()
    tokens = options.tokens or TOKENS[options.case]
    os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
    if options.found is not None:
        train(options.case, tokens, options.layers, options.found)
        return
    if torch.cuda.device_count() < 2:
        raise SystemExit(f"train_ranks needs two GPUs, and there are {torch.cuda.device_count()} here.")
    arguments = ["--case", options.case, "--tokens", str(tokens), "--layers", str(options.layers)]
    if options.case == "scaling":
        report("train_ranks", scaling(options.file, tokens, *arguments))
    else:
        report("train_ranks", split(tokens, *arguments))


if __name__ == "__main__":
    main()
