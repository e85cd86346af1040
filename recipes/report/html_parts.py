"""Pieces of HTML that the pages of reports are made of."""

import html
import re
from collections.abc import Sequence

from retention_gates.recipes.report import plots
from retention_gates.recipes.report.contents import (
    LOWER_IS_BETTER,
    METRICS,
    best,
    by_contender,
    contender_name,
    memory_sizes,
)
from retention_gates.recipes.report.page_template import PAGE
from retention_gates.trainers.evaluation.paired_statistics import Score, Summary


def whole_page(title: str, subtitle: str, parts: Sequence[str]) -> str:
    """The page with its styles and its script."""
    before, _, after = PAGE.partition("$BODY")
    head = before.replace("$TITLE", html.escape(title)).replace("$SUBTITLE", html.escape(subtitle))
    return head + "\n".join(parts) + after


def table(heads: Sequence[str], rows: Sequence[Sequence[str]], caption: str = "") -> str:
    """A table of texts whose first column names the rows."""
    head = "".join(f"<th>{html.escape(each)}</th>" for each in heads)
    body = "".join(
        f"<tr><th>{html.escape(row[0])}</th>{''.join(f'<td>{html.escape(cell)}</td>' for cell in row[1:])}</tr>"
        for row in rows
    )
    said = f"<caption>{html.escape(caption)}</caption>" if caption else ""
    return scrolling(f"<table>{said}<tr>{head}</tr>{body}</table>")


def section(title: str, content: str) -> str:
    return f"<section><h2>{html.escape(title)}</h2>{content}</section>"


def bullets(lines: Sequence[str]) -> str:
    """Lines with `names` in backticks as a list."""
    items = (re.sub(r"`([^`]*)`", r"<code>\1</code>", html.escape(line)) for line in lines)
    return f"<ul>{''.join(f'<li>{item}</li>' for item in items)}</ul>"


def scrolling(table: str) -> str:
    return f'<div class="scroll">{table}</div>'


def visible(text: str) -> str:
    return html.escape(text.replace("\n", "\u21b5"))


def number(score: Score, digits: int) -> str:
    error = "" if score.standard_error is None else f" <small>± {score.standard_error:.{digits}f}</small>"
    return f"{score.mean:.{digits}f}{error}"


def figure(svg: str, caption: str) -> str:
    return f"<figure>{svg}<figcaption>{caption}</figcaption></figure>"


def legend_buttons(kinds: list[tuple[str, str | None]], colours: dict[str, str]) -> str:
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


def overview(summaries: list[Summary], metric: str) -> str:
    """One row for each contender, one column for each memory size."""
    sizes = memory_sizes(summaries)
    winners = {size: best(metric, [s for s in summaries if s.memory_size == size]) for size in sizes}
    rows = []
    for name, by_size in by_contender(summaries, metric):
        cells = []
        for size in sizes:
            summary = by_size.get(size, by_size.get(None))
            text = "" if summary is None else number(summary.scores[metric], METRICS[metric][1])
            winner = summary is not None and summary is winners[size]
            cells.append(f'<td class="best">{text}</td>' if winner else f"<td>{text}</td>")
        rows.append(f"<tr><th>{html.escape(name)}</th>{''.join(cells)}</tr>")
    direction = "lower is better" if metric in LOWER_IS_BETTER else "higher is better"
    heads = "".join(f"<th>{size}</th>" for size in sizes)
    caption = f"{METRICS[metric][0]} ({direction}) by entries per head, ± standard error; best in bold"
    caption = html.escape(caption[0].upper() + caption[1:])
    return scrolling(f"<table><caption>{caption}</caption><tr><th></th>{heads}</tr>{''.join(rows)}</table>")
