"""Compares policies and memory sizes with the full cache, on text and on recall tasks.

    retention-gates evaluate --adapter out/adapter --memory-size 64 128 --output out/evaluation

writes results.jsonl (a header, then one object per row and contender), report.md and score.png.
"""

import argparse
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from retention_gates.recipes import plots, report, written_answers
from retention_gates.recipes.loading import (
    add_model_arguments,
    add_text_arguments,
    base_name,
    check_gates_trained,
    load_model,
    load_rows,
    load_token_documents,
    load_tokenizer,
)
from retention_gates.recipes.output import check_output, claim_output, replacing, write_text
from retention_gates.recipes.provenance import machine_and_versions

if TYPE_CHECKING:
    import torch
    from torch import nn
    from transformers import PreTrainedTokenizerBase

    from retention_gates.data.tasks import TaskExample
    from retention_gates.trainers.evaluation import Contender

RESULTS, REPORT, PICTURE = "results.jsonl", "report.md", "score.png"
POLICIES = ("retention", "streaming_llm", "random", "key_norm")
BUDGETS = ("uniform", "calibrated")
REFERENCE = "streaming_llm"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model_arguments(parser, adapter_required=False)
    add_text_arguments(parser, rows=8, length=1024, rows_option="--documents")
    parser.add_argument(
        "--start", type=int, metavar="T", help="first token whose forecast counts (default: the largest memory size)"
    )
    parser.add_argument(
        "--memory-size", nargs="+", type=int, default=[64, 128], metavar="M",
        help="entries kept per KV head, in the mean (default: 64 128)",
    )  # fmt: skip
    parser.add_argument(
        "--policies", nargs="+", metavar="NAME", help=f"among {', '.join(POLICIES)} (default: all that can run)"
    )
    parser.add_argument(
        "--budgets", nargs="+", metavar="KIND", help=f"among {', '.join(BUDGETS)} (default: all that the adapter has)"
    )
    parser.add_argument(
        "--tasks", nargs="+", default=[], metavar="NAME",
        help="recall tasks, such as passage_repeat, passkey:needles=3 or pitfalls (default: none)",
    )  # fmt: skip
    parser.add_argument(
        "--pin", action="store_true", help="of tasks with a system prompt: score each policy once more with it pinned"
    )
    parser.add_argument("--examples", type=int, default=16, metavar="N", help="of each task (default: 16)")
    parser.add_argument("--batch-size", type=int, default=1, metavar="B", help="rows per forward pass (default: 1)")
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="folder for results and pictures")
    written_answers.add_arguments(parser)


def main(options: argparse.Namespace) -> None:
    if written_answers.wanted(options):
        return written_answers.main(options)
    began, clock = datetime.now(UTC), time.monotonic()
    check_output(options.output)
    plots.require_matplotlib()
    for name in ("batch_size", "examples"):
        if getattr(options, name) < 1:
            raise ValueError(f"--{name.replace('_', '-')} {getattr(options, name)} must be 1 or more.")
    if min(options.memory_size) < 1:
        raise ValueError(f"--memory-size {min(options.memory_size)} must be 1 or more.")
    policies = options.policies or [name for name in POLICIES if name != "retention" or options.adapter]
    check_gates_trained(policies, options.adapter)
    start = _start(options)

    from retention_gates.data.tasks import build_tasks
    from retention_gates.trainers.comparison import aggregate
    from retention_gates.trainers.evaluation import contenders

    build_tasks(options.tasks)  # a misspelt name should not wait for the model
    if options.budgets:
        contenders(policies, options.memory_size, options.budgets)
    name = base_name(options.model, options.adapter)
    tokenizer = load_tokenizer(name, gguf_file=options.gguf_file)
    rows, examples = _texts(tokenizer, options)
    model = load_model(name, options.adapter, gguf_file=options.gguf_file, device=options.device, dtype=options.dtype)
    chosen = contenders(policies, options.memory_size, options.budgets or _budgets_of(model))
    records = _score(model, rows, examples, chosen, start, options)
    reference = REFERENCE if REFERENCE in policies and "uniform" in {c.budgets for c in chosen} else None
    summaries = aggregate(records, reference=reference)

    header: dict[str, Any] = {
        "model": name,
        "gguf_file": options.gguf_file,
        "adapter": options.adapter,
        "text": options.text,
        "held_out": _held_out(options),
        "rows": options.rows,
        "length": options.length,
        "start": start,
        "seed": options.seed,
        "tasks": options.tasks,
        "examples": options.examples if options.tasks else None,
        **machine_and_versions(model),
        "time": began.isoformat(timespec="seconds"),
        "seconds": round(time.monotonic() - clock, 1),
    }
    text = report.markdown(header, summaries, reference=reference)
    folder = claim_output(options.output)
    write_text(folder / RESULTS, report.json_lines(header, records))  # first: these took the time
    write_text(folder / REPORT, text)
    with replacing(folder / PICTURE) as temporary:
        plots.score_against_memory(summaries, temporary)
    print(text)
    print(f"written: {', '.join(str(folder / file) for file in (RESULTS, REPORT, PICTURE))}")


def _texts(
    tokenizer: "PreTrainedTokenizerBase", options: argparse.Namespace
) -> "tuple[torch.Tensor, dict[str, list[TaskExample]]]":
    """Rows of text [documents, length], and the examples of each task."""
    from retention_gates.data.tasks import build_tasks

    documents = load_token_documents(options, tokenizer)
    rows = load_rows(options, tokenizer, documents)
    return rows, {
        task.name: task.examples(tokenizer, documents, options.examples, options.length, options.seed, "test")
        for task in build_tasks(options.tasks)
    }


def _score(
    model: "nn.Module",
    rows: "torch.Tensor",
    examples: "dict[str, list[TaskExample]]",
    chosen: "list[Contender]",
    start: int,
    options: argparse.Namespace,
) -> list[dict[str, Any]]:
    from tqdm.auto import tqdm

    from retention_gates.data.tasks.pitfalls import leaks
    from retention_gates.trainers.evaluation import compare_answers, compare_rows, with_pinned

    asked = {task: with_pinned(chosen, batch) if options.pin else chosen for task, batch in examples.items()}
    passes = len(rows) * (1 + len(chosen)) + sum(len(b) * (1 + len(asked[task])) for task, b in examples.items())
    batch_size, seed = options.batch_size, options.seed
    with tqdm(total=passes, desc="evaluating", unit="row") as bar:
        records = compare_rows(model, rows, chosen, start=start, batch_size=batch_size, seed=seed, progress=bar.update)
        for task, batch in examples.items():
            bar.set_postfix_str(task)
            of_task = compare_answers(
                model, task, batch, asked[task], batch_size=batch_size, seed=seed, progress=bar.update
            )
            records += of_task + leaks(of_task)
    return records


def _start(options: argparse.Namespace) -> int:
    """The first position whose forecast counts: the largest memory size, unless told otherwise.

    From there on uniform budgets are full. Calibrated ones are larger in some heads, which may not be full yet.
    """
    if options.start is not None:
        return options.start
    start = max(options.memory_size)
    if start >= options.length - 1:
        raise ValueError(
            f"--length {options.length} is no longer than the largest memory of {start} entries, which never evicts: "
            "ask for longer passages, for smaller memories, or give --start 0."
        )
    return start


def _budgets_of(model: "nn.Module") -> list[str]:
    from retention_gates.gates.model import find_gated_model

    return list(BUDGETS) if find_gated_model(model).active_config.budget_shares else ["uniform"]


def _held_out(options: argparse.Namespace) -> str | None:
    if options.test_works:
        return ", ".join(options.test_works)
    if options.test_fraction is not None:
        return f"a share of {options.test_fraction:g}, split seed {options.split_seed}"
    return None
