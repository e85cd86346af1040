"""The report as one HTML page that needs nothing else: no other file and no network."""

import html
from collections.abc import Sequence
from typing import Any

import torch

from retention_gates.recipes.report import gate_maps, plots
from retention_gates.recipes.report.conclusions import findings
from retention_gates.recipes.report.contents import (
    FULL_CACHE,
    METRICS,
    TEXT,
    ModelReport,
    contender_name,
    memory_sizes,
    metric_of,
    panel_title,
    pareto_front,
)
from retention_gates.recipes.report.differing_answers import Answers
from retention_gates.recipes.report.evaluation_report import corrected_p, facts, introduction, legend, pairing_cells
from retention_gates.recipes.report.figures import svg_of
from retention_gates.recipes.report.html_parts import (
    bullets,
    figure,
    legend_buttons,
    number,
    overview,
    scrolling,
    section,
    visible,
    whole_page,
)
from retention_gates.trainers.evaluation.paired_statistics import Summary

PARETO = (
    "The broad grey steps are the Pareto front: at each memory size they stand at the best score that any policy "
    "reaches with so much memory or less, and a policy on them is beaten by none that takes less."
)


def page(header: dict[str, Any], models: Sequence[ModelReport]) -> str:
    """The whole page."""
    names = " and ".join(model.title for model in models)
    policies = {summary.policy for model in models for summary in model.summaries} - {FULL_CACHE}
    title = f"Which tokens to keep: {len(policies)} KV-cache policies on {names}"
    parts = [_findings(models), _facts(header, models)]
    parts += [_model(model, number) for number, model in enumerate(models)]
    parts.append(section("How to read this", bullets(legend(models))))
    return whole_page(title, introduction(models), parts)


def _findings(models: Sequence[ModelReport]) -> str:
    several = len(models) > 1
    said = []
    for model in models:
        said += [f"<h3>{html.escape(model.title)}</h3>"] if several else []
        said += [f"<p>{html.escape(sentence)}</p>" for sentence in findings(model)]
    return f'<section class="findings"><h2>Main findings</h2>{"".join(said)}</section>'


def _facts(header: dict[str, Any], models: Sequence[ModelReport]) -> str:
    return section("What was compared", bullets(facts(header, models)))


def _model(model: ModelReport, number: int) -> str:
    kinds = dict.fromkeys((s.policy, s.budgets) for s in model.summaries if s.policy != FULL_CACHE)
    series = [contender_name(*kind) for kind in kinds]
    colours = plots.colours_of([(task, summaries) for task, _, summaries in model.panels()])
    (_, length, text), *tasks = model.panels()
    entries = plots.score_panel(text, TEXT, length, colours=colours, series=series)
    in_bytes = plots.score_panel(text, TEXT, length, colours=colours, series=series, sizes=model.bytes)
    parts = [legend_buttons(list(kinds), colours), "<h3>Text: how far forecasts are from the full cache's</h3>"]
    parts.append(f'<div class="panels">{figure(entries, PARETO)}{figure(in_bytes, _pareto(model, text))}</div>')
    parts += [overview(text, metric_of(TEXT)), _details(model, text, TEXT)]
    whole = [panel for panel in tasks if "/" not in panel[0]]
    if whole:
        drawn = [
            plots.score_panel(summaries, task, length, colours=colours, series=series)
            for task, length, summaries in whole
        ]
        parts += ["<h3>Recall tasks: share of answer tokens that are right</h3>"]
        parts.append(f'<div class="panels">{"".join(figure(svg, "") for svg in drawn)}</div>')
    for task, length, summaries in tasks:
        parts.append(
            f"<details><summary>{html.escape(panel_title(task, length))}</summary>"
            f"{overview(summaries, metric_of(task))}{_details(model, summaries, task)}</details>"
        )
    if model.answers:
        parts += ["<h3>Answers that differ</h3>", *map(_answers, model.answers)]
    if model.shown is not None:
        parts.append(_heat_maps(model))
    return f'<section data-model="{number}"><h2>{html.escape(model.title)}</h2>{"".join(parts)}</section>'


def _pareto(model: ModelReport, text: "list[Summary]") -> str:
    points = [(model.bytes[s.policy, s.memory_size, s.budgets], s) for s in text if s.memory_size is not None]  # type: ignore[index]
    front = pareto_front("kl", points)
    named = [f"{contender_name(s.policy, s.budgets)} at {s.memory_size} ({n / 2**20:.2f} MiB)" for n, s in front]
    full = f"The full cache takes {model.bytes[None] / 2**20:.1f} MiB."
    return html.escape(f"No other policy is better with the same bytes or fewer: {'; '.join(named)}. {full}")


def _details(model: ModelReport, summaries: "list[Summary]", task: str) -> str:
    metrics = [metric for metric in METRICS if metric in summaries[0].scores]
    corrected = corrected_p(summaries, metric_of(task))
    heads = ["entries", "contender", *(METRICS[metric][0] for metric in metrics)]
    heads += [f"rows better than {model.reference}", "p (sign)", "p (mean)"] if model.reference else []
    rows = []
    for size in [None, *memory_sizes(summaries)]:
        for summary in [summary for summary in summaries if summary.memory_size == size]:
            cells = [number(summary.scores[metric], METRICS[metric][1]) for metric in metrics]
            cells += pairing_cells(summary, metric_of(task), corrected) if model.reference else []
            name = html.escape(contender_name(summary.policy, summary.budgets))
            data = "".join(f"<td>{cell}</td>" for cell in cells)
            rows.append(f"<tr><td>{'all' if size is None else size}</td><th>{name}</th>{data}</tr>")
    head = "".join(f"<th>{html.escape(each)}</th>" for each in heads)
    table = scrolling(f"<table><tr>{head}</tr>{''.join(rows)}</table>")
    return f"<details><summary>All scores, errors and tests</summary>{table}</details>"


def _answers(answers: "Answers") -> str:
    rows = []
    for name, pieces, share in answers.said:
        marked = "".join(f'<span class="{"right" if ok else "wrong"}">{visible(text)}</span>' for text, ok in pieces)
        rows.append(f'<tr><th>{html.escape(name)}</th><td class="said">{marked}</td><td>{share:.0%}</td></tr>')
    title = f"{panel_title(answers.task, answers.length)}, {answers.memory_size} entries per head"
    return (
        f'<article class="answer"><h4>{html.escape(title)}</h4>'
        f'<p class="question">… {html.escape(answers.question)}<mark>{html.escape(answers.expected)}</mark></p>'
        + scrolling(f"<table><tr><th></th><th>says</th><th>right</th></tr>{''.join(rows)}</table>")
        + "</article>"
    )


def _heat_maps(model: ModelReport) -> str:
    shown, reading = model.shown, model.shown.reading if model.shown else None
    assert shown is not None and reading is not None
    titles = (
        f"Half-life of a token's retention, median over {shown.rows} passages",
        f"What each head keeps of {reading.tokens} tokens",
    )
    lives = gate_maps.heat_map(shown.half_lives, layers=shown.layers, title=titles[0], label="half-life (tokens)")
    kept = gate_maps.kept_tokens(
        reading.eviction_times - torch.arange(reading.tokens),
        reading.eviction_times >= reading.tokens,
        layers=shown.layers,
        title=titles[1],
    )
    captions = (
        "After so many tokens the retention of a head's median token has halved.",
        f"With {shown.memory_size} entries per head on average, {shown.budgets} budgets; every line is a head.",
    )
    drawn = [
        figure(svg_of(drawing, title), html.escape(caption))
        for drawing, title, caption in zip((lives, kept), titles, captions, strict=True)
    ]
    return f'<h3>What the gates have learnt</h3><div class="panels">{"".join(drawn)}</div>'
