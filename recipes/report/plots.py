"""Scores against memory, drawn: panels for pages and a picture of all of them."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from retention_gates.gates.policies import POLICIES
from retention_gates.recipes.report.contents import (
    FULL_CACHE,
    METRICS,
    by_contender,
    contender_name,
    memory_sizes,
    metric_in,
    panel_title,
    pareto_front,
)
from retention_gates.recipes.report.figures import BLACK, new_figure, save_png, svg_of
from retention_gates.trainers.evaluation.paired_statistics import Summary

# Okabe and Ito's colours but their yellow, which is too faint for a line, and two more: told apart with any colour
# vision. Markers differ as well, for print and where colours recur.
GATES_COLOUR = "#D55E00"
COLOURS = ("#0072B2", "#009E73", "#CC79A7", "#8C6D00", "#56B4E9", BLACK, "#7E57C2", "#A3224F")
MARKERS = "sD^vPXo"
DASHES = {"calibrated": "-", "uniform": "--", "pyramid": "-.", "adaptive": ":"}
GREY = "#c4c4c4"
SAMPLE = 40  # points: the length of a piece of a line in a legend
IN_COLOUR = 3  # rivals of each panel that are not grey: more than a few lines cannot be told apart
FULL_CACHE_LABEL, OTHERS_LABEL = "full cache", "other policies"
PARETO_LABEL = "Pareto front: best with no more memory"
TICKS = (1, 2, 3, 5, 7)  # of each power of ten


@dataclass(frozen=True)
class Style:
    """The style of a policy with one kind of budgets, in every picture."""

    colour: str
    marker: str
    dashes: Any  # of matplotlib: a literal type
    width: float


def has_gates(policy: str) -> bool:
    name = policy.partition("+")[0]
    return name in POLICIES and POLICIES[name].needs_gates


def grey_ones(summaries: "Sequence[Summary]", metric: str) -> set[str]:
    """Names of the rivals that are not among the best few of a panel, by the mean over its memory sizes."""
    bounded = [summary for summary in summaries if summary.policy != FULL_CACHE]
    gated = {contender_name(summary.policy, summary.budgets) for summary in bounded if has_gates(summary.policy)}
    rivals = [name for name, _ in by_contender(bounded, metric) if name not in gated]
    return set(rivals[IN_COLOUR:])


def colours_of(panels: "Sequence[tuple[str, Sequence[Summary]]]") -> dict[str, str]:
    """A colour for each contender's name, the same in all panels (task and summaries) of a model.

    Those that stand in colour in any panel come first, so that colours recur late among them.
    """
    names: dict[str, None] = {}
    for _, summaries in panels:
        grey = grey_ones(summaries, metric_in(summaries))
        names |= dict.fromkeys(name for kind in _kinds(summaries) if (name := contender_name(*kind)) not in grey)
    names |= dict.fromkeys(contender_name(*kind) for _, summaries in panels for kind in _kinds(summaries))
    gated = {contender_name(*kind) for _, summaries in panels for kind in _kinds(summaries) if has_gates(kind[0])}
    rivals = [name for name in names if name not in gated]
    return dict.fromkeys(gated, GATES_COLOUR) | {
        name: COLOURS[place % len(COLOURS)] for place, name in enumerate(rivals)
    }


def style_of(policy: str, budgets: str | None, colours: dict[str, str]) -> Style:
    """The style of a contender: gates broad, dashed or not; others by their place among the policies.

    Args:
        colours: by name, as `colours_of` gives them.
    """
    name, plus, _ = policy.partition("+")
    colour = colours[contender_name(policy, budgets)]
    dashes = (0, (1, 1)) if plus else DASHES.get(budgets or "", "-")  # finely dotted with something added to it
    if has_gates(policy):
        return Style(colour, "o" if budgets == "calibrated" else "X", dashes, 2.4)
    others = [other for other, known in POLICIES.items() if not known.needs_gates]
    index = others.index(name) if name in others else len(others)
    # dashed are the gates, which have two kinds in most pictures
    dashes = dashes if plus or budgets != "uniform" else "-"
    return Style(colour, MARKERS[index % len(MARKERS)], dashes, 1.1)


def score_against_memory(summaries: Sequence["Summary"], path: Path) -> None:
    save_png(score_figure(summaries), path)


def score_figure(summaries: Sequence["Summary"]) -> Any:
    """One panel for the text and one for each task: a line per policy and kind of budgets, the full cache dotted.

    Gates and the best rivals of each panel are in colour; its other rivals are grey, without names.
    """
    panels: dict[tuple[str, int | None], list[Summary]] = {}
    for summary in summaries:
        panels.setdefault((summary.task, summary.length), []).append(summary)
    columns = min(3, len(panels))
    rows = math.ceil(len(panels) / columns)
    figure = new_figure(max(6.4, 4.6 * columns + 0.4), 4.2 * rows + 0.6)
    handles: dict[str, Any] = {}  # by name: what is in colour in any panel, then what explains the rest
    others: dict[str, Any] = {}
    colours = colours_of([(task, own) for (task, _), own in panels.items()])
    for index, ((task, length), own) in enumerate(panels.items()):
        axes = figure.add_subplot(rows, columns, index + 1)
        grey = grey_ones(own, metric_in(own))
        _draw_scores(axes, own, task, length, colours=colours, series=None, sizes=None)
        for kind in _kinds(own):
            if (name := contender_name(*kind)) not in grey:
                handles[name] = _sample(style_of(*kind, colours))
        lines, names = axes.get_legend_handles_labels()
        others |= dict(zip(names, lines, strict=True))
        if grey:
            others[OTHERS_LABEL] = _sample(Style(GREY, "", "-", 1.1))
    handles |= others
    figure.legend(
        handles.values(),
        handles.keys(),
        loc="outside lower center",
        ncols=columns + 1,
        frameon=False,
        handlelength=SAMPLE / 10,
    )
    return figure


def score_panel(
    summaries: "list[Summary]",
    task: str,
    length: int | None,
    *,
    colours: dict[str, str],
    series: Sequence[str],
    sizes: dict[Any, int] | None = None,
) -> str:
    """One panel as SVG, without a legend; what belongs to a contender has ids that begin with "series-INDEX-".

    Those of rivals beyond the best few end with "-grey": the page shows them so until they are singled out.

    Args:
        colours: by name, as `colours_of` gives them.
        series: names of contenders; their places are the INDEX.
        sizes: bytes by (policy, memory size, budgets) and of the full cache (None), to be the x axis in MiB. None: the
            x axis is entries per head.
    """
    figure = new_figure(4.5, 3.4)
    _draw_scores(figure.add_subplot(), summaries, task, length, colours=colours, series=series, sizes=sizes)
    return svg_of(figure, f"{panel_title(task, length)}: scores against memory")


def swatch(policy: str, budgets: str | None, colours: dict[str, str]) -> str:
    """A piece of the contender's line, as SVG."""
    figure = new_figure(SAMPLE / 72, 0.17)
    sample = _sample(style_of(policy, budgets, colours))
    sample.set_data([0.02, 0.5, 0.98], [0.5] * 3)
    sample.set_markevery([1])
    figure.add_artist(sample)
    return svg_of(figure)


def _sample(style: Style) -> Any:
    """A piece of a line for legends, the same in all of them: long enough for its dashes to be seen."""
    from matplotlib.lines import Line2D

    return Line2D(
        [], [], color=style.colour, linestyle=style.dashes, linewidth=style.width, marker=style.marker, markersize=6
    )


def _kinds(summaries: "Sequence[Summary]") -> list[tuple[str, str | None]]:
    """Policies with their budgets, in the order of first appearance, without the full cache."""
    return list(dict.fromkeys((s.policy, s.budgets) for s in summaries if s.policy != FULL_CACHE))


def _draw_scores(
    axes: Any,
    summaries: "list[Summary]",
    task: str,
    length: int | None,
    *,
    colours: dict[str, str],
    series: Sequence[str] | None,
    sizes: dict[Any, int] | None,
) -> None:
    metric = metric_in(summaries)
    bounded = [summary for summary in summaries if summary.policy != FULL_CACHE]
    kinds, grey = _kinds(summaries), grey_ones(summaries, metric)
    for index, kind in enumerate(kinds):
        name, style = contender_name(*kind), style_of(*kind, colours)
        line = sorted((s for s in bounded if (s.policy, s.budgets) == kind), key=lambda s: s.memory_size or 0)
        # a little aside, so that error bars of one memory size don't hide each other
        aside = 1.0 if sizes else 1.008 ** (index - len(kinds) / 2)
        drawn = axes.errorbar(
            [_memory(summary, sizes) * aside for summary in line],
            [summary.scores[metric].mean for summary in line],
            yerr=[summary.scores[metric].standard_error or 0.0 for summary in line],
            label="_nolegend_",
            color=GREY if name in grey and series is None else style.colour,  # a page does it by its styles
            marker=style.marker,
            markersize=6 if style.colour == GATES_COLOUR else 4.5,
            linestyle=style.dashes,
            linewidth=style.width,
            elinewidth=1,
            capsize=2,
            zorder=3 if style.colour == GATES_COLOUR else 1.5 if name in grey else 2,
        )
        if series is not None:
            place = series.index(name)
            for number, artist in enumerate(drawn.get_children()):
                artist.set_gid(f"series-{place}-{number}" + "-grey" * (name in grey))
    front = pareto_front(metric, [(_memory(summary, sizes), summary) for summary in bounded])
    if len(front) > 1:
        xs, ys = [x for x, _ in front], [summary.scores[metric].mean for _, summary in front]
        axes.step(xs, ys, where="post", color="#999999", linewidth=6, alpha=0.4, zorder=1, label=PARETO_LABEL)
    full = next((s.scores[metric].mean for s in summaries if s.policy == FULL_CACHE), None)
    if metric == "kl":
        axes.set_yscale("log")
        _plain_ticks(axes.yaxis)
    elif full is not None:
        axes.axhline(full, color=BLACK, linestyle=":", label=FULL_CACHE_LABEL)
        axes.set_ylim(-0.03, 1.03)
    axes.set_xscale("log", base=2 if sizes is None else 10)
    if sizes is None:
        ticks = memory_sizes(bounded)
        axes.set_xticks(ticks, [str(size) for size in ticks])
        axes.minorticks_off()
    else:
        _plain_ticks(axes.xaxis)
    where = "entries per KV head (mean)" if sizes is None else "MiB per sequence, all that a cache stores"
    heading = METRICS[metric][0]
    axes.set(title=panel_title(task, length), xlabel=where, ylabel=heading[0].upper() + heading[1:])
    axes.grid(alpha=0.3, which="both" if metric == "kl" else "major")


def _memory(summary: "Summary", sizes: dict[Any, int] | None) -> float:
    if sizes is None:
        return summary.memory_size or 0
    return sizes[summary.policy, summary.memory_size, summary.budgets] / 2**20


def _plain_ticks(axis: Any) -> None:
    """0.1, 0.2, 0.3 rather than powers of ten."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter, NullLocator

    axis.set_major_locator(LogLocator(10, subs=TICKS))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_locator(NullLocator())
    axis.set_minor_formatter(NullFormatter())
