"""The report as one HTML page that needs nothing else: no other file and no network."""

import html
import re
from collections.abc import Sequence
from typing import Any

import torch

from retention_gates.recipes.report import gate_maps, plots
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
    pareto_front,
)
from retention_gates.recipes.report.differing_answers import Answers
from retention_gates.recipes.report.evaluation_report import corrected_p, facts, introduction, legend, pairing_cells
from retention_gates.recipes.report.figures import svg_of
from retention_gates.recipes.report.page_template import PAGE
from retention_gates.trainers.evaluation.paired_statistics import Score, Summary

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
    parts.append(_section("How to read this", _list(legend(models))))
    before, _, after = PAGE.partition("$BODY")
    head = before.replace("$TITLE", html.escape(title)).replace("$SUBTITLE", html.escape(introduction(models)))
    return head + "\n".join(parts) + after


def _findings(models: Sequence[ModelReport]) -> str:
    several = len(models) > 1
    said = []
    for model in models:
        said += [f"<h3>{html.escape(model.title)}</h3>"] if several else []
        said += [f"<p>{html.escape(sentence)}</p>" for sentence in findings(model)]
    return f'<section class="findings"><h2>Main findings</h2>{"".join(said)}</section>'


def _facts(header: dict[str, Any], models: Sequence[ModelReport]) -> str:
    return _section("What was compared", _list(facts(header, models)))


def _model(model: ModelReport, number: int) -> str:
    kinds = dict.fromkeys((s.policy, s.budgets) for s in model.summaries if s.policy != FULL_CACHE)
    series = [contender_name(*kind) for kind in kinds]
    colours = plots.colours_of([(task, summaries) for task, _, summaries in model.panels()])
    (_, length, text), *tasks = model.panels()
    entries = plots.score_panel(text, TEXT, length, colours=colours, series=series)
    in_bytes = plots.score_panel(text, TEXT, length, colours=colours, series=series, sizes=model.bytes)
    parts = [_legend(list(kinds), colours), "<h3>Text: how far forecasts are from the full cache's</h3>"]
    parts.append(f'<div class="panels">{_figure(entries, PARETO)}{_figure(in_bytes, _pareto(model, text))}</div>')
    parts += [_overview(text, TEXT), _details(model, text, TEXT)]
    whole = [panel for panel in tasks if "/" not in panel[0]]
    if whole:
        drawn = [
            plots.score_panel(summaries, task, length, colours=colours, series=series)
            for task, length, summaries in whole
        ]
        parts += ["<h3>Recall tasks: share of answer tokens that are right</h3>"]
        parts.append(f'<div class="panels">{"".join(_figure(svg, "") for svg in drawn)}</div>')
    for task, length, summaries in tasks:
        parts.append(
            f"<details><summary>{html.escape(panel_title(task, length))}</summary>"
            f"{_overview(summaries, task)}{_details(model, summaries, task)}</details>"
        )
    if model.answers:
        parts += ["<h3>Answers that differ</h3>", *map(_answers, model.answers)]
    if model.shown is not None:
        parts.append(_heat_maps(model))
    return f'<section data-model="{number}"><h2>{html.escape(model.title)}</h2>{"".join(parts)}</section>'


def _legend(kinds: list[tuple[str, str | None]], colours: dict[str, str]) -> str:
    buttons = [
        f'<button type="button" data-series="{index}" aria-pressed="false">{plots.swatch(*kind, colours)}'
        f"<span>{html.escape(contender_name(*kind))}</span></button>"
        for index, kind in enumerate(kinds)
    ]
    hint = (
        f'<span class="hint">Click a policy to single it out. In colour: the gates, and the best {plots.IN_COLOUR} of '
        "the others in each plot. Dotted: full cache.</span>"
    )
    return f'<div class="legend">{"".join(buttons)}{hint}</div>'


def _figure(svg: str, caption: str) -> str:
    return f"<figure>{svg}<figcaption>{caption}</figcaption></figure>"


def _pareto(model: ModelReport, text: "list[Summary]") -> str:
    points = [(model.bytes[s.policy, s.memory_size, s.budgets], s) for s in text if s.memory_size is not None]  # type: ignore[index]
    front = pareto_front("kl", points)
    named = [f"{contender_name(s.policy, s.budgets)} at {s.memory_size} ({n / 2**20:.2f} MiB)" for n, s in front]
    full = f"The full cache takes {model.bytes[None] / 2**20:.1f} MiB."
    return html.escape(f"No other policy is better with the same bytes or fewer: {'; '.join(named)}. {full}")


def _overview(summaries: "list[Summary]", task: str) -> str:
    """One row for each contender, one column for each memory size."""
    metric = metric_of(task)
    sizes = memory_sizes(summaries)
    winners = {size: best(metric, [s for s in summaries if s.memory_size == size]) for size in sizes}
    rows = []
    for name, by_size in by_contender(summaries, metric):
        cells = []
        for size in sizes:
            summary = by_size.get(size, by_size.get(None))
            text = "" if summary is None else _number(summary.scores[metric], METRICS[metric][1])
            winner = summary is not None and summary is winners[size]
            cells.append(f'<td class="best">{text}</td>' if winner else f"<td>{text}</td>")
        rows.append(f"<tr><th>{html.escape(name)}</th>{''.join(cells)}</tr>")
    direction = "lower is better" if metric in LOWER_IS_BETTER else "higher is better"
    heads = "".join(f"<th>{size}</th>" for size in sizes)
    caption = f"{METRICS[metric][0]} ({direction}) by entries per head, ± standard error; best in bold"
    caption = html.escape(caption[0].upper() + caption[1:])
    return _scrolling(f"<table><caption>{caption}</caption><tr><th></th>{heads}</tr>{''.join(rows)}</table>")


def _details(model: ModelReport, summaries: "list[Summary]", task: str) -> str:
    metrics = [metric for metric in METRICS if metric in summaries[0].scores]
    corrected = corrected_p(summaries, metric_of(task))
    heads = ["entries", "contender", *(METRICS[metric][0] for metric in metrics)]
    heads += [f"rows better than {model.reference}", "p (sign)", "p (mean)"] if model.reference else []
    rows = []
    for size in [None, *memory_sizes(summaries)]:
        for summary in [summary for summary in summaries if summary.memory_size == size]:
            cells = [_number(summary.scores[metric], METRICS[metric][1]) for metric in metrics]
            cells += pairing_cells(summary, metric_of(task), corrected) if model.reference else []
            name = html.escape(contender_name(summary.policy, summary.budgets))
            data = "".join(f"<td>{cell}</td>" for cell in cells)
            rows.append(f"<tr><td>{'all' if size is None else size}</td><th>{name}</th>{data}</tr>")
    head = "".join(f"<th>{html.escape(each)}</th>" for each in heads)
    table = _scrolling(f"<table><tr>{head}</tr>{''.join(rows)}</table>")
    return f"<details><summary>All scores, errors and tests</summary>{table}</details>"


def _answers(answers: "Answers") -> str:
    rows = []
    for name, pieces, share in answers.said:
        marked = "".join(f'<span class="{"right" if ok else "wrong"}">{_visible(text)}</span>' for text, ok in pieces)
        rows.append(f'<tr><th>{html.escape(name)}</th><td class="said">{marked}</td><td>{share:.0%}</td></tr>')
    title = f"{panel_title(answers.task, answers.length)}, {answers.memory_size} entries per head"
    return (
        f'<article class="answer"><h4>{html.escape(title)}</h4>'
        f'<p class="question">… {html.escape(answers.question)}<mark>{html.escape(answers.expected)}</mark></p>'
        + _scrolling(f"<table><tr><th></th><th>says</th><th>right</th></tr>{''.join(rows)}</table>")
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
        _figure(svg_of(figure, title), html.escape(caption))
        for figure, title, caption in zip((lives, kept), titles, captions, strict=True)
    ]
    return f'<h3>What the gates have learnt</h3><div class="panels">{"".join(drawn)}</div>'


def _number(score: "Score", digits: int) -> str:
    error = "" if score.standard_error is None else f" <small>± {score.standard_error:.{digits}f}</small>"
    return f"{score.mean:.{digits}f}{error}"


def _section(title: str, content: str) -> str:
    return f"<section><h2>{html.escape(title)}</h2>{content}</section>"


def _list(lines: Sequence[str]) -> str:
    """Lines with `names` in backticks as a list."""
    items = (re.sub(r"`([^`]*)`", r"<code>\1</code>", html.escape(line)) for line in lines)
    return f"<ul>{''.join(f'<li>{item}</li>' for item in items)}</ul>"


def _scrolling(table: str) -> str:
    return f'<div class="scroll">{table}</div>'


def _visible(text: str) -> str:
    return html.escape(text.replace("\n", "\u21b5"))
