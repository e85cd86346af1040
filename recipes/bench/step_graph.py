"""A training step of a small model as one CUDA graph, beside the same step launched kernel by kernel.

    python recipes/bench/step_graph.py

Random weights of SmolLM2-135M's shape in bf16, rows of 1,024 tokens, end to end, through the trainer. Wall-clock time
of a step, optimiser and rows included.
"""

import argparse
import tempfile
import time
from typing import Any

import torch
from peft import get_peft_model
from transformers import TrainerCallback, set_seed

from retention_gates import RetentionGateConfig
from retention_gates.recipes.bench.follow_naive import Windows, random_base, text_of
from retention_gates.recipes.bench.harness import Measurement, report
from retention_gates.trainers.config import RetentionTrainingArguments
from retention_gates.trainers.trainer import RetentionTrainer

FIRST = 10  # steps that compile, warm up and capture
LENGTH = 1024


class Clock(TrainerCallback):
    """When the steps before and after those that are timed were done on the GPU."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step in (FIRST, state.max_steps):
            torch.cuda.synchronize()
            self.times.append(time.perf_counter())


def measure(contender: str, rows: int, steps: int, **changes: Any) -> Measurement:
    set_seed(0)
    base: Any = random_base()
    model = get_peft_model(base.to("cuda", torch.bfloat16), RetentionGateConfig(gate_width=128))
    text = Windows(torch.tensor(list(text_of(None).encode())), rows * (FIRST + steps), LENGTH)
    clock = Clock()
    torch.cuda.reset_peak_memory_stats()
    with tempfile.TemporaryDirectory() as folder:
        options: dict[str, Any] = {
            "save_strategy": "no",
            "report_to": [],
            "disable_tqdm": True,
            "logging_steps": FIRST,
        }
        options |= {"max_steps": FIRST + steps, "per_device_train_batch_size": rows, "learning_rate": 3e-3} | changes
        RetentionTrainer(model, RetentionTrainingArguments(folder, **options), text, callbacks=[clock]).train()
    first, last = clock.times
    return Measurement(
        f"SmolLM2-135M shape, {rows} x {LENGTH} tokens",
        contender,
        (last - first) / steps * 1000,
        "ms",
        peak_mib=torch.cuda.max_memory_allocated() / 2**20,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=[4, 16], help="of a step (default: 4 16)")
    parser.add_argument("--steps", type=int, default=30, help="to time (default: 30)")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("this benchmark needs a CUDA device.")
    contenders: dict[str, dict[str, Any]] = {
        "graph": {"cuda_graph": True},
        "kernel by kernel": {"gradient_checkpointing": False},
        "kernel by kernel, recomputing": {"gradient_checkpointing": True},
    }
    found = [
        measure(name, rows, options.steps, **changes) for rows in options.rows for name, changes in contenders.items()
    ]
    report("step_graph", found)


if __name__ == "__main__":
    main()
