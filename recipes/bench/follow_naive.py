"""A training run with fused kernels against the same run in plain torch: losses of every step, in fp32.

    python recipes/bench/follow_naive.py --random                      # a random model of SmolLM2-135M's shape
    python recipes/bench/follow_naive.py --model FOLDER --gguf-file NAME [--text FILE]

50 steps of 4 rows of 1,024 tokens, end to end, from one seed; --steps, --rows and --length make it shorter. Prints how
long each run took, compiling included, and the losses side by side, and exits with 1 where they differ by more than
1e-3 of the loss.
"""

import argparse
import os
import sys
import tempfile
import time
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import torch
from peft import get_peft_model
from torch.utils.data import Dataset
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel, set_seed

from retention_gates import RetentionGateConfig
from retention_gates.kernels.dispatch import VARIABLE
from retention_gates.recipes.bench.harness import SMOLLM2_135M, Measurement, report
from retention_gates.recipes.loading.models import load_base, load_tokenizer
from retention_gates.trainers.config import RetentionTrainingArguments
from retention_gates.trainers.trainer import RetentionTrainer

GOAL = 1e-3


class Windows(Dataset):
    """Rows of `length` tokens from anywhere in the text, two documents each, the same at every look."""

    def __init__(self, ids: torch.Tensor, count: int, length: int):
        if len(ids) <= length:
            raise ValueError(f"The text has {len(ids)} tokens, too few for rows of {length}: give a longer --text.")
        starts = torch.randint(len(ids) - length, (count,), generator=torch.Generator().manual_seed(0))
        self.rows = [ids[start : start + length] for start in starts.tolist()]
        first = length // 3
        self.positions = torch.cat([torch.arange(first), torch.arange(length - first)])

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        row = self.rows[index]
        return {"input_ids": row, "position_ids": self.positions, "labels": row}


class LossesKept(RetentionTrainer):
    """Keeps the loss of every forward pass, unrounded."""

    def __init__(self, *arguments: Any, **options: Any):
        super().__init__(*arguments, **options)
        self.losses: list[float] = []

    def compute_loss(self, *arguments: Any, **options: Any) -> torch.Tensor:
        loss = super().compute_loss(*arguments, **options)
        self.losses.append(loss.item())
        if len(self.losses) % 10 == 0:
            print(f"  step {len(self.losses)} of {self.args.max_steps}, loss {self.losses[-1]:.4f}", flush=True)
        return loss


def losses_of(form: str, base: Any, rows: Dataset, gate: RetentionGateConfig, **training: Any) -> list[float]:
    """The loss of every step of a run that starts from seed 0, with the kernels in one form: naive or fused.

    The base is as it was afterwards.
    """
    before = os.environ.get(VARIABLE)
    os.environ[VARIABLE] = form
    try:
        set_seed(0)
        with tempfile.TemporaryDirectory() as folder:
            options: dict[str, Any] = {"save_strategy": "no", "report_to": [], "disable_tqdm": True, "seed": 0}
            arguments = RetentionTrainingArguments(output_dir=folder, **(options | training))
            model = get_peft_model(base.to(arguments.device), gate)  # kernels run before training starts, too
            trainer = LossesKept(model, arguments, rows)
            try:
                trainer.train()
            finally:
                model.unload()
        return trainer.losses
    finally:
        if before is None:
            del os.environ[VARIABLE]
        else:
            os.environ[VARIABLE] = before


def largest_difference(ours: list[float], reference: list[float]) -> float:
    """Of two runs' losses, over the loss; infinite where one is not a number."""
    differences = [abs(a - b) / abs(b) for a, b in zip(ours, reference, strict=True)]
    return max(d if d == d else float("inf") for d in differences)


def random_base(**changes: Any) -> PreTrainedModel:
    """Random weights, larger than a default init: with those, hardly any attention depends on its keys."""
    model = AutoModelForCausalLM.from_config(
        LlamaConfig(**(SMOLLM2_135M | {"rope_theta": 100_000.0} | changes)), dtype=torch.float32
    )
    for parameter in model.parameters():
        if parameter.ndim >= 2:
            torch.nn.init.normal_(parameter, std=0.05)
    return model


def text_of(path: Path | None) -> str:
    """The file, or the help on Python's language that comes with it."""
    if path is not None:
        return path.read_text(encoding="utf-8")
    return "\n\n".join(topics.values())


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    model = parser.add_mutually_exclusive_group(required=True)
    model.add_argument("--model", help="Hub name or folder")
    model.add_argument("--random", action="store_true", help="random weights of SmolLM2-135M's shape, bytes as tokens")
    parser.add_argument("--gguf-file", metavar="NAME", help="the file inside --model that holds the weights as GGUF")
    parser.add_argument("--text", type=Path, metavar="FILE", help="what to train on (default: Python's own help)")
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--rows", type=int, default=4, help="per step (default: 4)")
    parser.add_argument("--length", type=int, default=1024, help="tokens of a row (default: 1024)")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("follow_naive compares with kernels that run on a CUDA GPU, and there is none here.")

    text = text_of(options.text)
    begun = time.perf_counter()
    if options.random:
        ids = torch.tensor(list(text.encode()))
        base = random_base()
    else:
        tokenizer = load_tokenizer(options.model, gguf_file=options.gguf_file)
        ids = torch.tensor(tokenizer(text, verbose=False)["input_ids"])
        base = load_base(options.model, gguf_file=options.gguf_file, dtype="float32")
    print(f"loaded in {time.perf_counter() - begun:.1f} s", flush=True)

    rows = Windows(ids, options.steps * options.rows, options.length)
    training: dict[str, Any] = {
        "max_steps": options.steps,
        "per_device_train_batch_size": options.rows,
        "learning_rate": 3e-3,
        "memory_size": 64,
        "logging_steps": options.steps,
        "gradient_checkpointing": False,
    }
    gate = RetentionGateConfig(gate_width=128)
    runs = []
    for form in ("naive", "fused"):
        begun = time.perf_counter()
        runs.append(losses_of(form, base, rows, gate, **training))
        print(f"{form} run: {time.perf_counter() - begun:.1f} s", flush=True)
    reference, ours = runs
    print(f"{'step':>4} {'naive':>12} {'fused':>12} {'difference':>10}")
    for step, (fused, naive) in enumerate(zip(ours, reference, strict=True), start=1):
        print(f"{step:4} {naive:12.6f} {fused:12.6f} {abs(fused - naive) / abs(naive):10.1e}")
    worst = largest_difference(ours, reference)
    name = "random, SmolLM2-135M shape" if options.random else Path(options.model).name
    case = f"{name}, {options.steps} steps of {options.rows} x {options.length}, fp32"
    report("follow_naive", [Measurement(case, "largest difference of a loss", worst, "of the loss", limit=GOAL)])
    print(f"largest difference {worst:.1e} of the loss (goal: at most {GOAL:.0e}); {torch.cuda.get_device_name()}")
    return int(not worst <= GOAL)


if __name__ == "__main__":
    sys.exit(main())
