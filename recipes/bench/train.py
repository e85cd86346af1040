"""Measures what training costs: one case per figure.

    python recipes/bench/train.py --case step       # tokens/s at T = 16,384 and its share of the matrix limit
    python recipes/bench/train.py --case long       # one row of 131,072 tokens: seconds and peak memory
    python recipes/bench/train.py --case small --steps 1200   # SmolLM2-135M's shape, steps of 4 x 1,024 tokens
    python recipes/bench/train.py --case start      # from the start of Python to the end of the first step, 4B
    python recipes/bench/train.py --case wire       # bytes that two gloo ranks exchange per step; runs on a CPU

All but the last need a GPU; random weights. "step" and "long" run Qwen3-4B's shape in bf16 through RetentionTrainer's
own step, with gradient checkpointing. The limit of "step" counts the matrix products of the teacher's forward pass,
the student's, its recomputation and its backward pass, at the rate that a large bf16 product reaches on the device.
`--offload` keeps checkpoints in the CPU's memory. Goals: step 0.45 of the limit, small 60 s, start 60 s.
"""

import argparse
import gc
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from peft import get_peft_model
from torch.utils.data import Dataset
from transformers import AutoModelForCausalLM, LlamaConfig, Qwen3Config, TrainerCallback

from retention_gates import RetentionGateConfig
from retention_gates.recipes.bench.harness import SMOLLM2_135M, Measurement, matrix_tflops, report, time_ms
from retention_gates.recipes.bench.train_step import (
    SHAPE,
    gated_step,
    least_ms,
    make_batch,
    make_model,
    make_trainer,
    peak_memory,
)
from retention_gates.recipes.bench.wire import bytes_per_step
from retention_gates.recipes.loading.models import load_base
from retention_gates.trainers.config import RetentionTrainingArguments
from retention_gates.trainers.trainer import RetentionTrainer

BENCH = "train"
START_STEPS = 10


def say(what: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} {what}", file=sys.stderr, flush=True)


class RandomRows(Dataset[dict[str, torch.Tensor]]):
    """Rows of random tokens, one document each."""

    def __init__(self, rows: int, tokens: int, vocabulary: int):
        self.ids = torch.randint(vocabulary, (rows, tokens), generator=torch.Generator().manual_seed(0))

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        ids = self.ids[index]
        return {"input_ids": ids, "labels": ids, "position_ids": torch.arange(len(ids))}


def step(tokens: int, layers: int, offload: bool) -> list[Measurement]:
    """Tokens per second of a whole step."""
    run, where = _one_row(tokens, layers, offload)
    say("first steps, which compile")
    milliseconds, spread = time_ms(run, warmup=2, repeats=5)
    say(f"{milliseconds:.0f} ms a step")
    rate = 1000 * tokens / milliseconds
    limit = 1000 * tokens / least_ms(tokens, layers, matrix_tflops())
    _, above = peak_memory(run)
    return [Measurement(where, "ours", rate, "tokens/s", rate * spread / milliseconds, limit, above)]


def long(tokens: int, layers: int, offload: bool) -> list[Measurement]:
    """Seconds and peak memory of a step, the second one."""
    run, where = _one_row(tokens, layers, offload)
    limit = least_ms(tokens, layers, matrix_tflops()) / 1000
    short, _ = _one_row(2048, 1, offload)
    say("a short step, which compiles")
    short()  # kernels are compiled, and the allocator is warm, before the clock starts
    del short
    gc.collect()
    torch.cuda.empty_cache()
    say(f"the step, at least {limit:.0f} s")
    began = time.monotonic()
    peak, above = peak_memory(run)
    seconds = time.monotonic() - began
    print(f"peak memory in all: {peak / 1024:.1f} GiB")
    return [Measurement(where, "ours", seconds, "s", None, limit, above)]


def _one_row(tokens: int, layers: int, offload: bool) -> tuple[Callable[[], Any], str]:
    say("making the model")
    model = make_model(
        "cuda",
        torch.bfloat16,
        offload_checkpoints=offload,
        num_hidden_layers=layers,
        max_position_embeddings=tokens,
        **SHAPE,
    )
    batch = make_batch(tokens, SHAPE["vocab_size"], "cuda")
    trainer = make_trainer(model, batch, Path(tempfile.mkdtemp()))
    offloaded = ", checkpoints on the CPU" if offload else ""
    return partial(gated_step, trainer, batch), f"Qwen3-4B shape, {layers} layers, T={tokens} bf16{offloaded}"


class Progress(TrainerCallback):
    """Tells how long steps take; those of the start, which compile and warm up, stand apart."""

    def __init__(self) -> None:
        self.began = time.monotonic()
        self.start_up = self.steady = 0.0  # seconds until the steps of the start are done, and of the others
        self.steps = 0  # of the others

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == START_STEPS:
            self._wait()
            self.start_up = time.monotonic() - self.began
            say(f"start-up and {START_STEPS} steps: {self.start_up:.1f} s")
        elif state.global_step > START_STEPS and (
            state.global_step % 100 == 0 or state.global_step == state.max_steps
        ):
            self._wait()
            self.steps = state.global_step - START_STEPS
            self.steady = time.monotonic() - self.began - self.start_up
            say(f"step {state.global_step}: {1000 * self.steady / self.steps:.1f} ms a step since then")

    @staticmethod
    def _wait() -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()


def small(steps: int) -> list[Measurement]:
    """Seconds of RetentionTrainer.train() with its own loader, optimiser and logs; ms of a step after the start."""
    say("making the model")
    with torch.device("cuda"):
        base = AutoModelForCausalLM.from_config(LlamaConfig(**SMOLLM2_135M), dtype=torch.bfloat16)
    with tempfile.TemporaryDirectory() as folder:
        trainer = small_trainer(get_peft_model(base, RetentionGateConfig()), steps, folder, cuda_graph=True)
        progress = Progress()
        trainer.add_callback(progress)
        trainer.train()
        seconds = time.monotonic() - progress.began
    where = "SmolLM2-135M shape, 4 x 1024"
    return [
        Measurement(f"{where}, {steps} steps with start-up", "ours", seconds, "s"),
        Measurement(
            f"{where}, a step after the first {START_STEPS}", "ours", 1000 * progress.steady / progress.steps, "ms"
        ),
    ]


def small_trainer(model: Any, steps: int, folder: str, **changes: Any) -> RetentionTrainer:
    """Trains `steps` steps of 4 x 1,024 tokens; such rows need no gradient checkpointing."""
    arguments = RetentionTrainingArguments(
        output_dir=folder,
        max_steps=steps,
        memory_size=64,
        gradient_checkpointing=False,
        report_to=[],
        save_strategy="no",
        logging_steps=100,
        disable_tqdm=True,
        **changes,
    )
    return RetentionTrainer(model, arguments, RandomRows(4 * steps, 1024, SMOLLM2_135M["vocab_size"]))


def start(layers: int) -> list[Measurement]:
    """Seconds from the start of Python to the end of a first step of 1,024 tokens, weights read from safetensors."""
    with tempfile.TemporaryDirectory() as folder:
        with torch.device("cuda"):
            config = Qwen3Config(num_hidden_layers=layers, max_position_embeddings=8192, **SHAPE)
            AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(folder)
        torch.cuda.empty_cache()
        gib = sum(path.stat().st_size for path in Path(folder).glob("*.safetensors")) / 2**30
        began = time.monotonic()
        subprocess.run([sys.executable, __file__, "--first-step", folder], check=True)
        seconds = time.monotonic() - began
    return [Measurement(f"first step, {gib:.1f} GiB of safetensors", "ours", seconds, "s")]


def first_step(folder: str) -> None:
    model = get_peft_model(load_base(folder, device="cuda"), RetentionGateConfig())
    with tempfile.TemporaryDirectory() as output:
        arguments = RetentionTrainingArguments(
            output_dir=output, max_steps=1, report_to=[], save_strategy="no", per_device_train_batch_size=1
        )
        RetentionTrainer(model, arguments, RandomRows(1, 1024, SHAPE["vocab_size"])).train()
    torch.cuda.synchronize()


def wire() -> list[Measurement]:
    """Bytes of the gates' gradients are the limit: nothing else has to be exchanged."""
    measured = bytes_per_step(ranks=2)
    case = f"2 gloo ranks, {measured.base_parameters} base and {measured.gate_parameters} gate parameters"
    limit = 4 * measured.gate_parameters
    return [
        Measurement(case, "gradients", measured.gradients, "B", None, limit),
        Measurement(case, "all collectives of a step", measured.every_collective, "B", None, limit),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case", choices=("step", "long", "small", "start", "wire"))
    parser.add_argument("--first-step", metavar="FOLDER", help=argparse.SUPPRESS)  # what "start" runs and times
    parser.add_argument("--tokens", type=int, help="default: 16,384 for step, 131,072 for long")
    parser.add_argument("--layers", type=int, default=36)
    parser.add_argument("--steps", type=int, default=210, help="of small (default: 210; the goal is for 1200)")
    parser.add_argument("--offload", action="store_true", help="checkpoints of step and long in the CPU's memory")
    options = parser.parse_args()
    if options.case is None and options.first_step is None:
        parser.error("name a case, such as --case step")
    if options.steps <= START_STEPS:
        parser.error(f"--steps {options.steps} must be above {START_STEPS}, the steps of the start")
    if options.case != "wire" and not torch.cuda.is_available():
        raise SystemExit(f"--case {options.case} measures a GPU, and there is none here; --case wire runs on a CPU.")
    os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")  # rows of one length, other shapes
    if options.first_step is not None:
        first_step(options.first_step)
        return
    cases: dict[str, Callable[[], list[Measurement]]] = {
        "step": lambda: step(options.tokens or 16_384, options.layers, options.offload),
        "long": lambda: long(options.tokens or 131_072, options.layers, options.offload),
        "small": lambda: small(options.steps),
        "start": lambda: start(options.layers),
        "wire": wire,
    }
    report(BENCH, cases[options.case]())


if __name__ == "__main__":
    main()
