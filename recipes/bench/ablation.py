"""Compares choices that may make better gates: variants of one recipe, several seeds each, scored under real eviction.

    python recipes/bench/ablation.py recipes/bench/ablation.yaml            # trains and scores; wants a GPU
    python recipes/bench/ablation.py recipes/bench/ablation.yaml --table    # what has been measured so far

A run trains gates as `retention-gates train` does, saves the adapter, loads it onto the base in fp32, and scores it on
works that were set aside: KL to the full cache on text, and exact answers of a recall task. It ends as one line of
results.jsonl in the output folder. Runs that have their line are not done again, those of a file that says
`keep: true` go on from their last checkpoint, and with --minutes none is started that would probably end too late.

All runs of all files share one process, one base and one set of texts: what is loaded and compiled once would take
longer than a run. Processes side by side were no faster on one GPU.
"""

import argparse
import gc
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
from retention_gates.data.tasks import TaskExample, build_task
from retention_gates.data.tokens import document_prefix
from retention_gates.gates.adapter.model import find_gated_model
from retention_gates.recipes import train
from retention_gates.recipes.comparison.fingerprints import of_value
from retention_gates.recipes.loading.config_file import build, read
from retention_gates.recipes.loading.models import load_base
from retention_gates.recipes.loading.output_folder import claim_output
from retention_gates.recipes.loading.provenance import machine_and_versions
from retention_gates.recipes.loading.run_config import RunConfig, load_config
from retention_gates.trainers.calibration import measure_shares
from retention_gates.trainers.evaluation.answers import compare_answers
from retention_gates.trainers.evaluation.contenders import Contender
from retention_gates.trainers.evaluation.text import compare_rows

WHAT = "an ablation"
RESULTS = "results.jsonl"


@dataclass
class Evaluation:
    """The data that every run is scored on."""

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
    keep: bool = False  # whether runs leave a folder each in the output, as train would


def read_ablation(path: Path) -> Ablation:
    given = read(path, list(Ablation.__dataclass_fields__))
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


class Bench:
    """The base model in each dtype that was asked for, the texts, and what all runs are scored on."""

    def __init__(self, config: RunConfig):
        assert config.model.name is not None
        self.source = (config.model.name, config.model.gguf_file)
        self.texts_of = _texts_of(config)
        self.texts = train.load_texts(config)
        name, gguf_file = self.source
        exact = load_base(name, gguf_file=gguf_file, device=config.training.device, dtype="float32")
        self.bases: dict[str, PreTrainedModel] = {"float32": exact}

    def run(self, config: RunConfig, evaluation: Evaluation, folder: Path) -> dict[str, Any]:
        """Trains in `folder`, or goes on there, and scores the adapter."""
        if (config.model.name, config.model.gguf_file) != self.source or _texts_of(config) != self.texts_of:
            raise ValueError("The runs of one call must share base model, sources and works set aside: call twice.")
        began = time.monotonic()
        dtype = "float32" if config.model.dtype == "auto" else config.model.dtype
        if dtype not in self.bases:
            self.bases[dtype] = in_dtype(self.bases["float32"], getattr(torch, dtype))
        trainer, calibration_rows, _ = train.build(config, self.texts, self.bases[dtype])
        train.write_run(folder, config)
        trainer.train(resume_from_checkpoint=any(folder.glob("checkpoint-*")))
        seconds = time.monotonic() - began
        if calibration_rows is not None:
            shares = measure_shares(trainer.model, calibration_rows)
            find_gated_model(trainer.model).active_config.budget_shares = shares
        trainer.save_adapter(folder / train.ADAPTER)
        last = [log for log in trainer.state.log_history if "loss" in log][-1]
        trainer.model.unload()
        del trainer
        gc.collect()  # it is part of circles; with it goes the memory of its CUDA graph
        return {
            "scores": self.score(folder / train.ADAPTER, evaluation),
            "train_seconds": round(seconds, 1),
            "seconds": round(time.monotonic() - began, 1),
            "last_log": {name: value for name, value in last.items() if "/" not in name},
            "machine": machine_and_versions(self.bases["float32"]),
        }

    def score(self, adapter: Path, asked: Evaluation) -> dict[str, float]:
        """KL and share of exact answers, by "kl calibrated 64" and "exact calibrated 64", "exact full"."""
        rows, examples = self._items(asked)
        model = PeftModel.from_pretrained(self.bases["float32"], adapter).eval()
        chosen = [Contender("retention", size, kind) for kind in asked.budgets for size in asked.memory_sizes]
        text = compare_rows(model, rows, chosen, start=asked.start, batch_size=asked.batch_size)
        answers = compare_answers(model, asked.task, examples, chosen, batch_size=2 * asked.batch_size)
        model.unload()
        scores: dict[str, list[float]] = {}
        for metric, records in (("kl", text), ("exact", [each for each in answers if each["task"] == asked.task])):
            for record in records:
                size = record["memory_size"]
                name = f"{metric} full" if size is None else f"{metric} {record['budgets']} {size}"
                scores.setdefault(name, []).append(record[metric])
        return {name: fmean(values) for name, values in scores.items()}

    def _items(self, asked: Evaluation) -> tuple[torch.Tensor, list[TaskExample]]:
        tokenizer, works = self.texts.tokenizer, self.texts.test
        rows = sample_windows(works, asked.length, asked.rows, seed=asked.seed, prefix_ids=document_prefix(tokenizer))
        task = build_task(asked.task)
        return rows, task.examples(tokenizer, works, asked.examples, asked.task_length, asked.seed, "test")


def _texts_of(config: RunConfig) -> list[Any]:
    """Gives the settings that decide which documents there are, and which of them are for tests."""
    data = config.data
    drawn = any(source.limit is not None or source.token_budget is not None for source in data.sources)
    seed = config.training.seed if drawn else None
    return [*(vars(source) for source in data.sources), seed, data.test_fraction, data.test_works, data.split_seed]


def in_dtype(base: PreTrainedModel, dtype: torch.dtype) -> PreTrainedModel:
    """A copy of a base model in another dtype; tables of rotary angles stay exact, which `.to` would round."""
    copy = AutoModelForCausalLM.from_config(base.config, dtype=dtype)
    copy.load_state_dict(base.state_dict())
    return copy.to(base.device).eval()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("configs", nargs="+", type=Path, metavar="ABLATION.yaml", help="done one after the other")
    parser.add_argument("--output", type=Path, default=Path("out/ablation"), help="folder (default: out/ablation)")
    parser.add_argument("--only", nargs="+", metavar="VARIANT", help="these variants (default: all)")
    parser.add_argument("--minutes", type=float, default=1e9, help="start no run that would probably end later")
    parser.add_argument("--table", action="store_true", help="only print what results.jsonl has")
    options = parser.parse_args()
    began = time.monotonic()
    ablations = [read_ablation(path) for path in options.configs]
    wanted = [
        [run for run in runs_of(ablation) if options.only is None or run.variant in options.only]
        for ablation in ablations
    ]
    if not options.table:
        torch.set_float32_matmul_precision("high")  # TF32 where there is, which is off by less than differences here
        done = read_results(options.output)
        todo = [
            (ablation, run)
            for ablation, runs in zip(ablations, wanted, strict=True)
            for run in runs
            if run.key not in done
        ]
        run_all(todo, options.output, until=began + 60 * options.minutes)
    for ablation, runs in zip(ablations, wanted, strict=True):
        print(table(runs, read_results(options.output), ablation))


def run_all(todo: list[tuple[Ablation, Run]], output: Path, *, until: float) -> None:
    """Args: until: on the monotonic clock; no run is started that would end later at the pace of the last one."""
    claim_output(output)
    bench = None
    pace = 0.0  # of the last run, seconds per step of training, all included
    for ablation, run in todo:
        start = time.monotonic()
        with tempfile.TemporaryDirectory() as scratch:
            folder = output / f"{run.variant}-{run.seed}".replace(" ", "-") if ablation.keep else Path(scratch)
            config = load_config(ablation.recipe, [*run.overrides, f"training.output_dir={folder}"])
            if start + pace * config.training.max_steps > until:
                print(f"stopped before {run.variant}, seed {run.seed}: the time is up")
                return
            claim_output(folder)
            bench = bench or Bench(config)
            result = bench.run(config, ablation.evaluation, folder)
        pace = (time.monotonic() - start) / config.training.max_steps
        line = {"variant": run.variant, "seed": run.seed, **result, "overrides": run.overrides, "key": run.key}
        with open(output / RESULTS, "a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
        shown = ", ".join(f"{name} {value:.3f}" for name, value in result["scores"].items() if "full" not in name)
        print(f"{run.variant}, seed {run.seed}: {shown}; {result['seconds']} s", flush=True)


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
