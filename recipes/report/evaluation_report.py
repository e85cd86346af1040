"""The files that an evaluation leaves in words and numbers: results.jsonl and report.md."""

import json
from collections.abc import Sequence
from typing import Any

from retention_gates.checkpoints.evaluation_files import without_folders
from retention_gates.recipes.report.conclusions import findings
from retention_gates.recipes.report.contents import (
    FULL_CACHE,
    LOWER_IS_BETTER,
    METRICS,
    TEXT,
    ModelReport,
    best,
    by_contender,
    contender_name,
    memory_sizes,
    metric_of,
    panel_title,
)
from retention_gates.trainers.evaluation.paired_statistics import Score, Summary, holm


def json_lines(header: dict[str, Any], records: Sequence[dict[str, Any]]) -> str:
    """The header and each record as one JSON object a line."""
    objects = [{"kind": "header", **header}, *({"kind": "record", **record} for record in records)]
    return "".join(json.dumps(each, allow_nan=False) + "\n" for each in objects)


def result_lines(header: dict[str, Any], models: Sequence[ModelReport]) -> str:
    """The header, then each model with its facts, the bytes of its caches and its records, one object a line."""
    records: list[dict[str, Any]] = []
    for model in models:
        records.append({"kind": "model", "title": model.title, **model.facts})
        for key, nbytes in model.bytes.items():
            names = dict(zip(("policy", "memory_size", "budgets"), key or ("full", None, None), strict=True))
            records.append({"kind": "memory", "model": model.title, **names, "bytes": nbytes})
        records += [{"kind": "record", "model": model.title, **record} for record in model.records]
    return json_lines(header, records)


def summary_lines(header: dict[str, Any], models: Sequence[ModelReport]) -> str:
    """Every mean as benchmarks write theirs: `spread` is the standard error, `limit` what the full cache reaches."""
    objects = []
    for model in models:
        machine = {"gpu": model.facts["device"]} | {name: model.facts[name] for name in ("torch", "triton", "commit")}
        for task, length, summaries in model.panels():
            metric = metric_of(task)
            full = next(s.scores[metric].mean for s in summaries if s.policy == FULL_CACHE)
            for each in summaries:
                if each.memory_size is None or each.budgets is None:
                    continue
                nbytes = model.bytes.get((each.policy, each.memory_size, each.budgets))
                measured = {
                    "bench": "compare",
                    "case": f"{model.title} {task} T={length} M={each.memory_size} rows={each.rows}",
                    "contender": contender_name(each.policy, each.budgets),
                    "value": each.scores[metric].mean,
                    "unit": METRICS[metric][0],
                    "spread": each.scores[metric].standard_error,
                    "limit": full,
                    "peak_mib": None if nbytes is None else nbytes / 2**20,
                    "error": None,
                }
                objects.append(measured | machine | {"time": header["time"]})
    return "".join(json.dumps(each, allow_nan=False) + "\n" for each in objects)


def markdown(header: dict[str, Any], models: Sequence[ModelReport]) -> str:
    """The report: findings, what was run, for each model a table of each kind of score, and how to read them."""
    lines = ["# Bounded memory against the full cache", "", introduction(models), ""]
    for model in models:
        lines += [f"**{model.title}.** " + " ".join(findings(model)), ""]
    lines += ["## What was compared", "", *(f"- {fact}" for fact in facts(header, models)), ""]
    for model in models:
        for task, length, summaries in model.panels():
            lines += [f"## {model.title}: {panel_title(task, length)}", ""]
            lines += [*_overview(summaries, metric_of(task)), ""]
            lines += ["<details><summary>all scores</summary>", "", *_table(model, summaries, task), "", "</details>"]
            lines += [""]
    lines += ["## How to read this", "", *(f"- {line}" for line in legend(models))]
    return "\n".join(lines) + "\n"


def introduction(models: Sequence[ModelReport]) -> str:
    """Explains what is measured, and its unit, for somebody who has never heard of it."""
    sizes = sorted({size for model in models for size in memory_sizes(model.summaries)})
    return (
        f"Every policy keeps the same number of entries per KV head at every step, {' or '.join(map(str, sizes))} on "
        "average. What is lost on text is the KL divergence from the full cache: how far the forecasts of the next "
        "token are from those that the same model makes with everything in its cache. It is counted in nats per "
        "token, and 0 is no loss: at 0.1 nats the tokens that the full cache expects are forecast with "
        "exp(-0.1) = 0.90 times its probability, in the (geometric) mean, at 1 nat with 0.37 times. On tasks the "
        "answers themselves are counted."
    )


def facts(header: dict[str, Any], models: Sequence[ModelReport]) -> list[str]:
    """Lists what was run, a line each; names are in backticks."""
    seeds = ", ".join(map(str, header["seeds"]))
    lines = []
    for model in models:
        known = model.facts
        name = without_folders(known["model"])
        adapter = f"adapter `{known['adapter']}`" if known["adapter"] else "no adapter, gates untrained"
        file = f" (`{known['gguf_file']}`)" if known["gguf_file"] else ""
        commit = f", commit {known['commit']}" if known["commit"] else ""
        without = (
            f"; without {', '.join(known['left_out'])}, which this model cannot have" if known["left_out"] else ""
        )
        lines.append(
            f"{model.title}: `{name}`{file}, {adapter}; retention-gates {known['retention_gates']}{commit}, "
            f"{known['device']}, {known['dtype']}, torch {known['torch']}, transformers {known['transformers']}"
            + without
        )
    lines.append(
        f"text: {header['rows']} passages of {header['length']} tokens from `{header['text']}` for each seed"
        + (f", held-out works: {header['held_out']}" if header["held_out"] else "")
        + f"; forecasts after token {header['start']} count; seeds {seeds}"
    )
    for name, task in header["tasks"].items():
        lengths = ", ".join(map(str, task["lengths"]))
        lines.append(f"task `{name}`: {task['examples']} examples of {lengths} tokens for each seed")
    return [*lines, f"run of {header['time']}, {header['seconds']:.0f} s"]


def legend(models: Sequence[ModelReport]) -> list[str]:
    """Explains how numbers are to be read, a line each."""
    reference = next((model.reference for model in models if model.reference), None)
    lines = [
        "Entries per head: the mean number of cached tokens that a KV head keeps, prefill and decode alike. Uniform "
        "budgets give every head this number, calibrated ones divide the same total by what each head wants.",
        "The full cache is the base model. ± is the standard error over rows; bold is the best of a memory size. Rows "
        "of different seeds may come from the same work, or even overlap, so the true error is somewhat larger.",
        "Answers are teacher-forced: each token must be the most likely one after the right ones before it.",
    ]
    if reference:
        lines.append(
            f"Rows better: rows on which a contender beats `{reference}` with the same number of entries, by KL on "
            "text and by answer tokens on tasks; p (sign): two-sided sign test over those rows, equal ones left out. "
            "p (mean): two-sided sign-flip test of the mean difference, corrected (Holm) for all of a table."
        )
    return lines


def number(score: "Score", digits: int) -> str:
    if score.standard_error is None:
        return f"{score.mean:.{digits}f}"
    return f"{score.mean:.{digits}f} ± {score.standard_error:.{digits}f}"


def _overview(summaries: "list[Summary]", metric: str) -> list[str]:
    """One row for each contender, one column for each memory size."""
    heading, digits = METRICS[metric]
    sizes = memory_sizes(summaries)
    winners = {size: best(metric, [s for s in summaries if s.memory_size == size]) for size in sizes}
    arrow = "lower is better" if metric in LOWER_IS_BETTER else "higher is better"
    lines = [f"{heading[:1].upper() + heading[1:]} ({arrow}), by entries per head:", ""]
    lines += ["| | " + " | ".join(map(str, sizes)) + " |", "|---|" + "---:|" * len(sizes)]
    for name, by_size in by_contender(summaries, metric):
        cells = []
        for size in sizes:
            summary = by_size.get(size, by_size.get(None))
            text = "" if summary is None else number(summary.scores[metric], digits)
            cells.append(f"**{text}**" if summary is not None and summary is winners[size] else text)
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return lines


def _table(model: ModelReport, summaries: "list[Summary]", task: str) -> list[str]:
    metrics = [metric for metric in METRICS if metric in summaries[0].scores]
    headings = ["entries per head", "policy", "budgets", *(METRICS[metric][0] for metric in metrics)]
    corrected = corrected_p(summaries, metric_of(task))
    if model.reference:
        headings += [f"rows better than {model.reference}", "p (sign)", "p (mean)"]
    if task == TEXT:
        headings.append("MiB")
    lines = ["| " + " | ".join(headings) + " |", "|---:|---|---|" + "---:|" * (len(headings) - 3)]
    for size in [None, *memory_sizes(summaries)]:
        of_size = [summary for summary in summaries if summary.memory_size == size]
        winners = {metric: best(metric, of_size) for metric in metrics}
        for summary in of_size:
            cells = ["all" if size is None else str(size), summary.policy, summary.budgets or ""]
            for metric in metrics:
                text = number(summary.scores[metric], METRICS[metric][1])
                cells.append(f"**{text}**" if summary is winners[metric] else text)
            if model.reference:
                cells += pairing_cells(summary, metric_of(task), corrected)
            if task == TEXT:
                nbytes = model.bytes[None if size is None else (summary.policy, size, summary.budgets or "")]
                cells.append(f"{nbytes / 2**20:.2f}")
            lines.append("| " + " | ".join(cells) + " |")
    return lines


def corrected_p(summaries: "list[Summary]", metric: str) -> dict[int, float]:
    """p of the mean difference, corrected over all of a table's contenders, by the summary's id."""
    paired = [(summary, summary.scores[metric].pairing) for summary in summaries]
    known = [(summary, pairing.p_mean) for summary, pairing in paired if pairing is not None]
    corrected = holm([p for _, p in known])
    return {id(summary): p for (summary, _), p in zip(known, corrected, strict=True)}


def pairing_cells(summary: "Summary", metric: str, corrected: dict[int, float]) -> list[str]:
    pairing = summary.scores[metric].pairing
    if pairing is None:
        return ["", "", ""]
    rows = pairing.wins + pairing.losses + pairing.ties
    ties = f" ({pairing.ties} equal)" if pairing.ties else ""
    return [f"{pairing.wins} of {rows}{ties}", f"{pairing.p_value:.2g}", f"{corrected[id(summary)]:.2g}"]
