"""The files that an evaluation leaves: results.jsonl and report.md."""

import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # importing it takes seconds, which a command's --help should not
    from retention_gates.trainers.comparison import Score, Summary

COLUMNS = {  # metric -> heading and digits after the point
    "kl": ("KL to the full cache, nats per token", 3),
    "perplexity_ratio": ("perplexity / full cache's", 3),
    "agreement": ("same top-1 token", 3),
    "token_accuracy": ("answer tokens right", 2),
    "exact": ("answers exact", 2),
}
PAIRED = {"text": "kl", "task": "token_accuracy"}  # what rows are compared by
FULL_CACHE, TEXT = "full", "text"


def json_lines(header: dict[str, Any], records: Sequence[dict[str, Any]]) -> str:
    """The header and each record as one JSON object a line."""
    objects = [{"kind": "header", **header}, *({"kind": "record", **record} for record in records)]
    return "".join(json.dumps(each, allow_nan=False) + "\n" for each in objects)


def markdown(header: dict[str, Any], summaries: Sequence["Summary"], *, reference: str | None) -> str:
    """The report: what was run, one table for the text and one for each task, and how to read them."""
    lines = ["# Bounded memory against the full cache", "", *_facts(header), ""]
    for task in dict.fromkeys(summary.task for summary in summaries):
        lines += [f"## {'Text' if task == TEXT else 'Task ' + task}", ""]
        lines += _table([summary for summary in summaries if summary.task == task], task, reference) + [""]
    lines += ["## How to read this", "", *_legend(reference)]
    return "\n".join(lines) + "\n"


def _facts(header: dict[str, Any]) -> list[str]:
    adapter = header["adapter"] or "none, gates untrained"
    where = f"{header['device']}, {header['dtype']}, torch {header['torch']}, transformers {header['transformers']}"
    lines = [
        f"- model: `{header['model']}`" + (f" (`{header['gguf_file']}`)" if header["gguf_file"] else ""),
        f"- adapter: {adapter if header['adapter'] is None else f'`{adapter}`'}",
        f"- text: {header['rows']} passages of {header['length']} tokens from `{header['text']}`"
        + (f", held-out works: {header['held_out']}" if header["held_out"] else "")
        + f"; forecasts after token {header['start']} count; seed {header['seed']}",
    ]
    if header["tasks"]:
        names = ", ".join(header["tasks"])
        lines.append(f"- tasks: {names}; {header['examples']} examples each of {header['length']} tokens")
    commit = f", commit {header['commit']}" if header["commit"] else ""
    return [
        *lines,
        f"- run: retention-gates {header['retention_gates']}{commit}, {where}; {header['time']}, "
        f"{header['seconds']:.0f} s",
    ]


def _table(summaries: Sequence["Summary"], task: str, reference: str | None) -> list[str]:
    metrics = [metric for metric in COLUMNS if metric in summaries[0].scores]
    paired = PAIRED["text" if task == TEXT else "task"]
    headings = ["entries per head", "policy", "budgets", *(COLUMNS[metric][0] for metric in metrics)]
    if reference:
        headings += [f"rows better than {reference}", "p of that"]
    lines = ["| " + " | ".join(headings) + " |", "|---:|---|---|" + "---:|" * (len(headings) - 3)]
    sizes = sorted({summary.memory_size for summary in summaries if summary.memory_size is not None})
    for size in [None, *sizes]:
        of_size = [summary for summary in summaries if summary.memory_size == size]
        best = {metric: _best(metric, of_size) for metric in metrics}
        for summary in of_size:
            cells = ["all" if size is None else str(size), summary.policy, summary.budgets or ""]
            for metric in metrics:
                text = _number(summary.scores[metric], COLUMNS[metric][1])
                cells.append(f"**{text}**" if summary is best[metric] else text)
            if reference:
                cells += _pairing(summary.scores[paired])
            lines.append("| " + " | ".join(cells) + " |")
    return lines


def _best(metric: str, summaries: Sequence["Summary"]) -> "Summary | None":
    """The one that is better than all others; none if several are, or if there is nothing to be better than."""
    sign = 1 if metric in ("kl", "perplexity_ratio") else -1
    ranked = sorted(summaries, key=lambda summary: sign * summary.scores[metric].mean)
    first, second = (ranked[:2] + [None])[:2]
    if first is None or second is None or first.scores[metric].mean == second.scores[metric].mean:
        return None
    return first


def _number(score: "Score", digits: int) -> str:
    if score.standard_error is None:
        return f"{score.mean:.{digits}f}"
    return f"{score.mean:.{digits}f} ± {score.standard_error:.{digits}f}"


def _pairing(score: "Score") -> list[str]:
    pairing = score.pairing
    if pairing is None:
        return ["", ""]
    rows = pairing.wins + pairing.losses + pairing.ties
    ties = f" ({pairing.ties} equal)" if pairing.ties else ""
    return [f"{pairing.wins} of {rows}{ties}", f"{pairing.p_value:.2g}"]


def _legend(reference: str | None) -> list[str]:
    lines = [
        "- Entries per head: the mean number of cached tokens that a KV head keeps, prefill and decode alike. Uniform",
        "  budgets give every head this number, calibrated ones divide the same total by what each head wants.",
        "- The full cache is the base model. ± is the standard error over rows; bold is the best of a memory size.",
    ]
    if reference:
        lines += [
            f"- Rows better: rows on which a contender beats `{reference}` with the same number of entries, by KL on",
            "  text and by answer tokens on tasks. p: two-sided sign test over those rows, equal ones left out.",
        ]
    return lines
