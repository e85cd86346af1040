"""Which choices make better gates: variants of one recipe, several seeds each, scored under real eviction.

    python recipes/bench/ablation.py recipes/bench/ablation.yaml                 # everything, one run after the other
    python recipes/bench/ablation.py recipes/bench/ablation.yaml --shard 0/3     # every third run, beside 1/3 and 2/3
    python recipes/bench/ablation.py recipes/bench/ablation.yaml --table         # what has been measured so far

A run trains gates as `retention-gates train` does, saves the adapter, loads it onto the base in fp32, and scores it on
works that were set aside: KL to the full cache on text, and exact answers of a recall task. It ends as one line of
results.jsonl in the output folder; runs that have their line are not done again, and with --minutes none is started
that would probably not be finished in time. Wants a GPU.
"""

import argparse
import json
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import torch
import yaml
from peft import PeftModel
from transformers import AutoModelForCausalLM, PreTrainedModel

from retention_gates.data.packing import sample_windows
from retention_gates.data.tasks import build_task
from retention_gates.data.tokens import document_prefix
from retention_gates.gates.model import find_gated_model
from retention_gates.recipes import train
from retention_gates.recipes.config_file import build, read
from retention_gates.recipes.fingerprints import of_value
from retention_gates.recipes.loading import load_base
from retention_gates.recipes.output import claim_output
from retention_gates.recipes.provenance import machine_and_versions
from retention_gates.recipes.run_config import load_config
from retention_gates.trainers.calibration import measure_shares
from retention_gates.trainers.evaluation import Contender, compare_answers, compare_rows

WHAT = "an ablation"
RESULTS = "results.jsonl"


@dataclass
class Evaluation:
    """What every run is scored on."""

    memory_sizes: list[int] = field(default_factory=lambda: [32, 64, 128, 256])  # mean entries per KV head
    budgets: list[str] = field(default_factory=lambda: ["calibrated"])
    rows: int = 16  # passages
    length: int = 2048  # tokens of each
    start: int = 512  # first token whose forecast counts
    task: str = "code_lookup"
    examples: int = 64
    task_length: int = 1024  # tokens of each
    batch_size: int = 8
    seed: int = 0


@dataclass
class Ablation:
    """A recipe, what the variants change in it, and how they are scored."""

    recipe: str  # relative to this file's folder
    variants: dict[str, Any]  # name -> {section.key: value}
    overrides: dict[str, Any] = field(default_factory=dict)  # of all variants
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2])
    evaluation: Evaluation = field(default_factory=Evaluation)


def read_ablation(path: Path) -> Ablation:
    given = read(path, [f for f in Ablation.__dataclass_fields__])
    given["evaluation"] = build(Evaluation, given.get("evaluation") or {}, "evaluation", what=WHAT)
    ablation = build(Ablation, given, "ablation", what=WHAT)
    ablation.recipe = str(path.parent / ablation.recipe)
    return ablation


@dataclass
class Run:
    """One training run of the ablation."""

    variant: str
    seed: int
    overrides: list[str]
    key: str  # of all that its result depends on


def runs_of(ablation: Ablation) -> list[Run]:
    """Seed by seed, so that what a stopped ablation has measured can be compared."""
    recipe = yaml.safe_load(Path(ablation.recipe).read_text(encoding="utf-8"))
    found = []
    for seed in ablation.seeds:
        for variant, changes in ablation.variants.items():
            settings = ablation.overrides | (changes or {}) | {"training.seed": seed}
            key = of_value([recipe, settings, vars(ablation.evaluation)])
            # JSON is YAML
            found.append(Run(variant, seed, [f"{name}={json.dumps(value)}" for name, value in settings.items()], key))
    return found


def read_results(folder: Path) -> dict[str, dict[str, Any]]:
    """Whole lines of results.jsonl by key; a last line that was cut off is left out."""
    path = folder / RESULTS
    *lines, _ = path.read_text(encoding="utf-8").split("\n") if path.is_file() else [""]
    return {result["key"]: result for result in map(json.loads, lines)}


class Judge:
    """The base in fp32 on its device, and the rows and examples that all runs are scored on."""

    def __init__(self, base: PreTrainedModel, texts: train.Texts, evaluation: Evaluation):
        self.base, self.evaluation = base, evaluation
        prefix = document_prefix(texts.tokenizer)
        rows, length, seed = evaluation.rows, evaluation.length, evaluation.seed
        self.rows = sample_windows(texts.test, length, rows, seed=seed, prefix_ids=prefix)
        task = build_task(evaluation.task)
        self.examples = task.examples(
            texts.tokenizer, texts.test, evaluation.examples, evaluation.task_length, seed, "test"
        )

    def score(self, adapter: Path) -> dict[str, float]:
        """KL and share of exact answers, by "kl calibrated 64" and "exact calibrated 64", "exact full"."""
        asked = self.evaluation
        model = PeftModel.from_pretrained(self.base, adapter).eval()
        chosen = [Contender("retention", size, kind) for kind in asked.budgets for size in asked.memory_sizes]
        text = compare_rows(model, self.rows, chosen, start=asked.start, batch_size=asked.batch_size)
        answers = compare_answers(model, asked.task, self.examples, chosen, batch_size=2 * asked.batch_size)
        model.unload()
        scores: dict[str, list[float]] = {}
        for metric, records in (("kl", text), ("exact", [each for each in answers if each["task"] == asked.task])):
            for record in records:
                size = record["memory_size"]
                name = f"{metric} full" if size is None else f"{metric} {record['budgets']} {size}"
                scores.setdefault(name, []).append(record[metric])
        return {name: fmean(values) for name, values in scores.items()}


def in_dtype(base: PreTrainedModel, dtype: torch.dtype) -> PreTrainedModel:
    """A copy of a base model in another dtype; tables of rotary angles stay exact, which `.to` would round."""
    copy = AutoModelForCausalLM.from_config(base.config, dtype=dtype)
    copy.load_state_dict(base.state_dict())
    return copy.to(base.device).eval()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("config", type=Path, metavar="ABLATION.yaml")
    parser.add_argument("--output", type=Path, default=Path("out/ablation"), help="folder (default: out/ablation)")
    parser.add_argument("--only", nargs="+", metavar="VARIANT", help="these variants (default: all)")
    parser.add_argument("--shard", default="0/1", metavar="I/N", help="every N-th run from the I-th on (default: 0/1)")
    parser.add_argument("--minutes", type=float, default=1e9, help="start no run that would probably end later")
    parser.add_argument("--keep", action="store_true", help="keep adapters, in a folder for each run")
    parser.add_argument("--table", action="store_true", help="only print what results.jsonl has")
    options = parser.parse_args()
    began = time.monotonic()
    ablation = read_ablation(options.config)
    index, count = map(int, options.shard.split("/"))
    runs = [run for run in runs_of(ablation) if options.only is None or run.variant in options.only]
    if not options.table:
        done = read_results(options.output)
        todo = [run for run in runs[index::count] if run.key not in done]
        if todo:
            run_all(todo, ablation, options, began)
    print(table(runs, read_results(options.output), ablation))


def run_all(todo: list[Run], ablation: Ablation, options: argparse.Namespace, began: float) -> None:
    first = load_config(ablation.recipe, [*todo[0].overrides, "training.output_dir=unused"])
    texts = train.load_texts(first)
    assert first.model.name is not None
    device = first.training.device
    exact = load_base(first.model.name, gguf_file=first.model.gguf_file, device=device, dtype="float32")
    judge = Judge(exact, texts, ablation.evaluation)
    bases: dict[str, PreTrainedModel] = {"float32": exact}
    claim_output(options.output)
    print(f"loaded after {time.monotonic() - began:.0f} s", flush=True)
    torch.set_float32_matmul_precision("high")  # TF32 where the device has it: off by less than any difference here
    longest = 0.0
    for run in todo:
        start = time.monotonic()
        if start - began + longest > 60 * options.minutes:
            print(f"stopped before {run.variant}, seed {run.seed}: the time is up")
            return
        with tempfile.TemporaryDirectory() as scratch:
            folder = options.output / f"{run.variant}-{run.seed}" if options.keep else Path(scratch)
            config = load_config(ablation.recipe, [*run.overrides, f"training.output_dir={folder}"])
            dtype = config.model.dtype if config.model.dtype != "auto" else "float32"
            if dtype not in bases:
                bases[dtype] = in_dtype(exact, getattr(torch, dtype))
            trainer, calibration_rows = train.build(config, texts, bases[dtype])
            trainer.train()
            trained = time.monotonic()
            if calibration_rows is not None:
                shares = measure_shares(trainer.model, calibration_rows)
                find_gated_model(trainer.model).active_config.budget_shares = shares
            trainer.save_adapter(folder / train.ADAPTER)
            last = [log for log in trainer.state.log_history if "loss" in log][-1]
            trainer.model.unload()
            del trainer  # and with it the memory of its CUDA graph
            scores = judge.score(folder / train.ADAPTER)
        longest = max(longest, time.monotonic() - start)
        result = {
            "variant": run.variant,
            "seed": run.seed,
            "scores": scores,
            "train_seconds": round(trained - start, 1),
            "seconds": round(time.monotonic() - start, 1),
            "last_log": {name: value for name, value in last.items() if "/" not in name},
            "overrides": run.overrides,
            "machine": machine_and_versions(exact),
            "key": run.key,
        }
        with open(options.output / RESULTS, "a", encoding="utf-8") as file:
            file.write(json.dumps(result) + "\n")  # one write, so that shards may share the file
        shown = ", ".join(f"{name} {value:.3f}" for name, value in scores.items() if "full" not in name)
        print(f"{run.variant}, seed {run.seed}: {shown}; {result['train_seconds']} + ... s", flush=True)


def table(runs: list[Run], results: dict[str, dict[str, Any]], ablation: Ablation) -> str:
    """Markdown: for each variant the mean over its seeds, ± their standard deviation."""
    asked = ablation.evaluation
    columns = [f"kl {kind} {size}" for kind in asked.budgets for size in asked.memory_sizes]
    columns += [f"exact {kind} {size}" for kind in asked.budgets for size in asked.memory_sizes] + ["exact full"]
    lines = [f"| variant | seeds | {' | '.join(columns)} | s |", "|---" * (len(columns) + 3) + "|"]
    for variant in ablation.variants:
        found = [results[run.key] for run in runs if run.variant == variant and run.key in results]
        if found:
            cells = [_cell([result["scores"][column] for result in found]) for column in columns]
            seconds = fmean(result["train_seconds"] for result in found)
            lines.append(f"| {variant} | {len(found)} | {' | '.join(cells)} | {seconds:.0f} |")
    return "\n".join(lines)


def _cell(values: list[float]) -> str:
    return f"{fmean(values):.3f}" + (f" ± {stdev(values):.3f}" if len(values) > 1 else "")


if __name__ == "__main__":
    main()
