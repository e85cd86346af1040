"""The report on written answers as one HTML page that needs nothing else: no other file and no network."""

import html
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from typing import Any

from retention_gates.data.suites import EncodedQuestion
from retention_gates.recipes.report import plots
from retention_gates.recipes.report.answer_tables import (
    METRIC,
    Example,
    Panels,
    examples,
    findings,
    lengths,
    paired_tests,
    panels_of,
)
from retention_gates.recipes.report.contents import FULL_CACHE, contender_name, memory_sizes
from retention_gates.recipes.report.html_parts import (
    bullets,
    figure,
    legend_buttons,
    overview,
    scrolling,
    section,
    table,
    visible,
    whole_page,
)
from retention_gates.trainers.evaluation.paired_statistics import Summary

READING = (
    "Entries per head: the mean number of cached tokens that a KV head keeps, in prompt and answer. The full cache is "
    "the base model. ± is the standard error over questions; of several answers to a question the mean counts.",
    "p: two-sided sign test over the questions on which two contenders differ, McNemar's exact test where answers are "
    "right or wrong; corrected (Holm) for all of a column. The best gates and the best rival are chosen by the scores "
    "that they are then compared by.",
    "Cut: the answer had not ended at its longest. Loop: its last tokens are some tokens four times in a row, 32 or "
    "more in all. An answer that is cut is scored as far as it went.",
)


def answers_page(
    title: str,
    facts: Sequence[str],
    summaries: Sequence[Summary],
    records: Sequence[dict[str, Any]],
    questions: Mapping[tuple[str, int], EncodedQuestion],
) -> str:
    """The whole page.

    Args:
        title: of the model.
        facts: what was run, a line each; names are in backticks.
        records: every answer.
        questions: by task and row, as far as they are known.
    """
    panels = panels_of(summaries)
    said = "".join(f"<p>{html.escape(sentence)}</p>" for sentence in findings(panels))
    parts = [f'<section class="findings"><h2>Main findings</h2>{said}</section>']
    parts += [section("What was run", bullets(facts)), _tasks(panels, records)]
    if differing := examples(panels, records, questions):
        parts.append(section("Answers that differ", "".join(map(_example, differing))))
    parts.append(section("How to read this", bullets(READING)))
    sizes = sorted({size for own in panels.values() for size in memory_sizes(own)})
    kept = f"{sizes[0]} to {sizes[-1]} entries" if len(sizes) > 1 else f"{sizes[0]} entries"
    subtitle = f"Answers of its own words, token by token, with {kept} kept per KV head, and with the full cache."
    return whole_page(f"Written answers of {title} with a bounded memory", subtitle, parts)


def _tasks(panels: Panels, records: Sequence[dict[str, Any]]) -> str:
    kinds = list(
        dict.fromkeys((s.policy, s.budgets) for own in panels.values() for s in own if s.policy != FULL_CACHE)
    )
    parts = []
    if find_spec("matplotlib") is None:
        parts.append("<p>Without plots: the package matplotlib is not installed where this was written.</p>")
    else:
        series = [contender_name(*kind) for kind in kinds]
        colours = plots.colours_of(list(panels.items()))
        drawn = [plots.score_panel(own, task, None, colours=colours, series=series) for task, own in panels.items()]
        parts += [
            legend_buttons(kinds, colours),
            f'<div class="panels">{"".join(figure(svg, "") for svg in drawn)}</div>',
        ]
    for task, own in panels.items():
        parts.append(f"<h3>{html.escape(task)}</h3>{overview(own, METRIC)}")
        for name, (heads, rows) in (
            ("Paired tests", paired_tests(own)),
            ("Lengths, cut answers and loops", lengths([record for record in records if record["task"] == task])),
        ):
            if rows:
                parts.append(f"<details><summary>{name}</summary>{table(heads, rows)}</details>")
    return f'<section data-model="0"><h2>Scores</h2>{"".join(parts)}</section>'


def _example(example: Example) -> str:
    rows = ""
    for said in example.said:
        words = f'<span class="{"right" if said.score > 0.5 else "wrong"}">{visible(said.answer)}</span>'
        rows += f'<tr><th>{html.escape(said.name)}</th><td class="said">{words}</td>'
        rows += f"<td>{said.score:g}</td><td>{html.escape(said.remark)}</td></tr>"
    title = f"{example.task}, question {example.row + 1}, {example.memory_size} entries per head"
    return (
        f'<article class="answer"><h4>{html.escape(title)}</h4><p class="question">{html.escape(example.question)} '
        f"<mark>{html.escape(example.expected)}</mark></p>"
        + scrolling(f"<table><tr><th></th><th>says</th><th>score</th><th></th></tr>{rows}</table>")
        + "</article>"
    )
