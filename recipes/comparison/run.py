"""Runs a comparison: loads each model, scores its contenders, and writes results and reports."""

import argparse
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from functools import partial
from operator import mul
from pathlib import Path

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from retention_gates.checkpoints.evaluation_files import REPORT, RESULTS
from retention_gates.data.tasks import build_tasks
from retention_gates.gates.adapter.model import find_gated_model
from retention_gates.gates.adapter.placement import check_room
from retention_gates.gates.cache.rotary_frequencies import rotary_frequencies
from retention_gates.gates.policies import POLICIES, FeedbackPolicy, find_policy
from retention_gates.recipes.comparison.comparison_config import ComparisonConfig, ContenderSection, ModelEntry
from retention_gates.recipes.comparison.result_store import ResultStore
from retention_gates.recipes.comparison.scoring import Block, Scorer
from retention_gates.recipes.loading.models import (
    adapter_config,
    base_name,
    check_gates_trained,
    load_model,
    load_tokenizer,
)
from retention_gates.recipes.loading.output_folder import check_output, claim_output, replacing, write_text
from retention_gates.recipes.loading.provenance import machine_and_versions
from retention_gates.recipes.loading.rows import load_rows, load_token_documents
from retention_gates.recipes.report import evaluation_report, html_page, plots
from retention_gates.recipes.report.contents import ModelReport, Shown
from retention_gates.recipes.report.differing_answers import differing_answers
from retention_gates.recipes.report.figures import require_matplotlib
from retention_gates.recipes.report.gate_reading import median_half_lives, read_text
from retention_gates.trainers.evaluation.cache_bytes import memory_bytes
from retention_gates.trainers.evaluation.contenders import MEASURED, Contender, contenders
from retention_gates.trainers.evaluation.kept_mass import with_measured_budgets
from retention_gates.trainers.evaluation.paired_statistics import aggregate

SUMMARY, PAGE, PICTURE = "summary.jsonl", "report.html", "score.png"
HALF_LIFE_ROWS = 4  # passages over which the medians of half-lives are taken


@dataclass
class Source:
    """A model entry whose name and policies are settled."""

    title: str
    name: str
    gguf_file: str | None
    entry: ModelEntry
    policies: list[str]


def run(config: ComparisonConfig) -> None:
    """Scores all models, prints the report, and writes it with the results to the output folder."""
    began, clock = datetime.now(UTC), time.monotonic()
    folder = Path(config.run.output)
    check_output(folder)
    require_matplotlib()
    _check_room(config)
    start = config.start
    sources = [_settle(title, entry, config) for title, entry in config.models.items()]
    store = ResultStore(folder)
    with _matmul_precision(config.run.matmul_precision):
        models = [_compare(source, config, start, store) for source in sources]
    header = {
        "text": config.text.source,
        "held_out": config.held_out,
        "rows": config.text.rows,
        "length": config.text.length,
        "start": start,
        "seeds": config.run.seeds,
        "tasks": {name: asdict(task) for name, task in config.tasks.items()},
        "reference": config.contenders.reference,
        "time": began.isoformat(timespec="seconds"),
        "seconds": round(time.monotonic() - clock, 1),
    }
    claim_output(folder)
    write_text(folder / RESULTS, evaluation_report.result_lines(header, models))  # first: these took the time
    write_text(folder / SUMMARY, evaluation_report.summary_lines(header, models))
    text = evaluation_report.markdown(header, models)
    write_text(folder / REPORT, text)
    with replacing(folder / PICTURE) as temporary:
        plots.score_against_memory(models[0].summaries, temporary)
    write_text(folder / PAGE, html_page.page(header, models))
    print(text)
    print(f"written: {', '.join(str(folder / file) for file in (RESULTS, SUMMARY, REPORT, PAGE, PICTURE))}")


@contextmanager
def _matmul_precision(name: str) -> Iterator[None]:
    """Of products of fp32 numbers on a GPU, until the block ends."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(name)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def _settle(title: str, entry: ModelEntry, config: ComparisonConfig) -> Source:
    """Checks all that can be checked before a model is loaded."""
    name = base_name(entry.name, entry.adapter)
    chosen = config.contenders
    policies = chosen.policies or [p for p in POLICIES if can_run(p, entry.adapter)]
    check_gates_trained([*policies, *(name.split("/")[0] for name in chosen.extra)], entry.adapter)
    if entry.adapter is not None:
        adapter_config(entry.adapter)
    build_tasks(list(config.tasks))
    _contenders(policies, chosen, chosen.budgets or ["uniform"])
    return Source(title, name, entry.gguf_file, entry, policies)


def _contenders(policies: list[str], section: ContenderSection, budgets: list[str]) -> "list[Contender]":
    chosen = contenders(policies, section.memory_sizes, budgets)
    for name in section.extra:
        policy, _, division = name.partition("/")
        more = [Contender(policy, size, division) for size in section.memory_sizes]
        if set(more) & set(chosen):
            raise ValueError(f"contenders.extra={name!r} is among them already: leave it out.")
        chosen += more
    return chosen


def can_run(policy: str, adapter: str | None) -> bool:
    """Whether a policy has all that it needs: gates, or something that a comparison does not give to anyone."""
    try:
        Contender(policy, memory_size=1)
    except ValueError:
        return False
    return adapter is not None or not find_policy(policy).needs_gates


def _compare(source: Source, config: ComparisonConfig, start: int, store: ResultStore) -> ModelReport:
    entry = source.entry
    tokenizer = load_tokenizer(source.name, gguf_file=source.gguf_file)
    blocks = _blocks(config, tokenizer, start)
    model = load_model(
        source.name, entry.adapter, gguf_file=source.gguf_file, device=config.run.device, dtype=entry.dtype
    )
    left_out = {} if config.contenders.policies else _unfit(source.policies, model)
    for name, reason in left_out.items():
        print(f"{source.title} without {name}: {reason}")
    policies = [name for name in source.policies if name not in left_out]
    chosen = _contenders(policies, config.contenders, config.contenders.budgets or _budgets_of(model))
    if any(contender.budgets == MEASURED for contender in chosen):
        asked = _asked(config)
        others = load_token_documents(asked, tokenizer, training_works=True)
        chosen = with_measured_budgets(model, chosen, load_rows(asked, tokenizer, others), _announce)
    records = Scorer(model, chosen, store, config.run.batch_size, pin=config.contenders.pin).score(blocks)
    rows = blocks[0].items
    sizes = memory_bytes(model, rows[0], chosen)
    uniform = {contender.policy for contender in chosen if contender.budgets == "uniform"}
    reference = config.contenders.reference if config.contenders.reference in uniform else None
    return ModelReport(
        title=source.title,
        facts={
            "model": entry.package or source.name,
            "gguf_file": source.gguf_file,
            "adapter": entry.adapter,
            "left_out": sorted(left_out),
            **machine_and_versions(model),
        },
        summaries=aggregate(records, reference=reference),
        records=records,
        reference=reference,
        gated=sorted({str(c.policy) for c in chosen if find_policy(c.policy).needs_gates}),
        bytes=dict(zip([None, *((str(c.policy), c.memory_size, c.budgets) for c in chosen)], sizes, strict=True)),
        shown=_shown(model, rows, chosen) if entry.adapter else None,
        answers=differing_answers(records, blocks, tokenizer),
    )


def _unfit(policies: list[str], model: "nn.Module") -> dict[str, str]:
    """Gives the policies that cannot run with a model that is loaded, and why."""
    reasons = {}
    for name in policies:
        policy = find_policy(name)
        if isinstance(policy, FeedbackPolicy) and policy.needs_rotation:
            try:
                rotary_frequencies(find_gated_model(model).model, name)
            except ValueError as error:
                reasons[name] = str(error)
    return reasons


def _check_room(config: ComparisonConfig) -> None:
    """Raises ValueError for tasks with more examples than there is memory for their ids, 8 bytes each."""
    host = torch.device("cpu")
    for name, task in config.tasks.items():
        each = 8 * sum(task.lengths or []) * len(config.run.seeds)
        check_room(f"tasks.{name}.examples", task.examples, partial(mul, each), host, "for their ids")


def _blocks(config: ComparisonConfig, tokenizer: "PreTrainedTokenizerBase", start: int) -> list[Block]:
    """Rows of text, then the examples of each task; seeds draw from the same documents."""
    text, seeds, asked = config.text, config.run.seeds, _asked(config)
    asked.rows = text.rows * len(seeds)  # passages that the documents should at least have
    documents = load_token_documents(asked, tokenizer)
    blocks = []
    for seed in seeds:
        asked.rows, asked.seed = text.rows, seed
        blocks.append(Block("text", text.length, seed, list(load_rows(asked, tokenizer, documents)), start))
    for task, entry in zip(build_tasks(list(config.tasks)), config.tasks.values(), strict=True):
        for length in entry.lengths or []:
            for seed in seeds:
                examples = task.examples(tokenizer, documents, entry.examples, length, seed, "test")
                blocks.append(Block(task.name, length, seed, examples))
    return blocks


def _shown(model: "nn.Module", rows: "Sequence[torch.Tensor]", chosen: "Sequence[Contender]") -> Shown | None:
    """Content of the heat maps: half-lives over some rows, and entries kept of the first, at the middle size."""
    gated = [contender for contender in chosen if find_policy(contender.policy).needs_gates]
    if not gated:
        return None
    sizes = sorted({contender.memory_size for contender in gated})
    one = [contender for contender in gated if contender.memory_size == sizes[(len(sizes) - 1) // 2]][-1]
    some = torch.stack(list(rows[:HALF_LIFE_ROWS]))
    layers = find_gated_model(model).active_config.gated_layers
    assert layers is not None
    reading = read_text(model, rows[0], memory_size=one.memory_size, budgets=one.division)
    return Shown(median_half_lives(model, some), len(some), reading, list(layers), one.memory_size, one.budgets)


def _asked(config: ComparisonConfig) -> argparse.Namespace:
    """The text as the text arguments of commands name it."""
    text = config.text
    return argparse.Namespace(
        **{name: getattr(text, name) for name in ("split", "subset", "text_field", "work_field")},
        **{name: getattr(text, name) for name in ("test_fraction", "test_works", "split_seed", "length", "rows")},
        text=text.source,
        seed=config.run.seeds[0],
    )


def _announce(policy: str) -> None:
    print(f"measuring the kept mass of {policy}", file=sys.stderr)


def _budgets_of(model: "nn.Module") -> list[str]:
    has_shares = find_gated_model(model).active_config.budget_shares
    return ["uniform", "calibrated"] if has_shares else ["uniform"]
