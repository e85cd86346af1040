"""Pictures of evaluations and of gates, as PNG files."""

import io
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import IO, Any

import torch

from retention_gates.gates.policies import POLICIES
from retention_gates.recipes.report.contents import (
    FULL_CACHE,
    METRICS,
    contender_name,
    memory_sizes,
    metric_of,
    panel_title,
    pareto_front,
)
from retention_gates.trainers.evaluation.paired_statistics import Summary

# Okabe and Ito's colours: told apart with any colour vision. Markers differ as well, for print and where colours
# recur.
GATES_COLOUR = "#D55E00"
COLOURS = ("#0072B2", "#009E73", "#CC79A7", "#8C6D00", "#56B4E9", "#000000")  # not their yellow: too faint for a line
MARKERS = "sD^vPXo"
DASHES = {"calibrated": "-", "uniform": "--", "pyramid": "-.", "adaptive": ":"}
FULL_CACHE_LABEL = "full cache"
TICKS = (1, 2, 3, 5, 7)  # of each power of ten


@dataclass(frozen=True)
class Style:
    """How a policy with one kind of budgets is drawn, in every picture."""

    colour: str
    marker: str
    dashes: Any  # of matplotlib: a literal type
    width: float


def require_matplotlib() -> None:
    """Raises ValueError if pictures can't be drawn here."""
    if find_spec("matplotlib") is None:
        raise ValueError("Pictures need the package matplotlib: pip install 'retention-gates[demo]'.")


def style_of(policy: str, budgets: str | None) -> Style:
    """The same policy looks the same everywhere: gates by a colour of their own, others by their place in the list."""
    name, plus, _ = policy.partition("+")
    dashes = (0, (1, 1)) if plus else DASHES.get(budgets or "", "-")  # finely dotted with something added to it
    if name in POLICIES and POLICIES[name].needs_gates:
        return Style(GATES_COLOUR, "o" if budgets == "calibrated" else "X", dashes, 2.4)
    others = [other for other, known in POLICIES.items() if not known.needs_gates]
    # numbers of colours and markers have no common factor, so that pairs of them recur late
    index = others.index(name) if name in others else len(others)
    dashes = (
        dashes if plus or budgets != "uniform" else "-"
    )  # dashed are the gates, which have two kinds in most pictures
    return Style(COLOURS[index % len(COLOURS)], MARKERS[index % len(MARKERS)], dashes, 1.1)


def score_against_memory(summaries: Sequence["Summary"], path: Path) -> None:
    """One panel for the text and one for each task: a line per policy and kind of budgets, the full cache dotted."""
    panels: dict[tuple[str, int | None], list[Summary]] = {}
    for summary in summaries:
        panels.setdefault((summary.task, summary.length), []).append(summary)
    columns = min(3, len(panels))
    rows = math.ceil(len(panels) / columns)
    figure = _figure(max(6.4, 4.6 * columns + 0.4), 4.2 * rows + 0.6)
    for index, ((task, length), own) in enumerate(panels.items()):
        axes = figure.add_subplot(rows, columns, index + 1)
        _draw_scores(axes, own, task, length, series=None, sizes=None)
        if index == 0:
            handles, labels = axes.get_legend_handles_labels()
            figure.legend(handles, labels, loc="outside lower center", ncols=2 * columns, frameon=False)
    _save(figure, path)


def score_panel(
    summaries: "list[Summary]",
    task: str,
    length: int | None,
    *,
    series: Sequence[str],
    sizes: dict[Any, int] | None = None,
) -> str:
    """One panel as SVG, without a legend; what belongs to a contender has ids that begin with "series-INDEX-".

    Args:
        series: names of contenders; their places are the INDEX.
        sizes: bytes by (policy, memory size, budgets) and of the full cache (None), to be the x axis in MiB. None: the
            x axis is entries per head.
    """
    figure = _figure(4.5, 3.4)
    _draw_scores(figure.add_subplot(), summaries, task, length, series=series, sizes=sizes)
    return _svg(figure)


def swatch(policy: str, budgets: str | None) -> str:
    """A piece of the contender's line, as SVG."""
    from matplotlib.lines import Line2D

    style = style_of(policy, budgets)
    figure = _figure(0.5, 0.17)
    line = Line2D([0.02, 0.5, 0.98], [0.5] * 3, color=style.colour, linestyle=style.dashes, linewidth=style.width)
    figure.add_artist(line)
    figure.add_artist(Line2D([0.5], [0.5], color=style.colour, marker=style.marker, linestyle="", markersize=6))
    return _svg(figure)


def heat_map(values: "torch.Tensor", path: Path | IO[bytes], *, layers: Sequence[int], title: str, label: str) -> None:
    """One cell for each layer and KV head on a logarithmic scale.

    Args:
        values: positive, [layers, H], in the unit that `label` names.
        layers: the layers' indices in the model.
    """
    from matplotlib.colors import LogNorm

    grid = values.double().numpy().T  # heads upwards, layers to the right
    heads, count = grid.shape
    low, high = float(grid.min()), float(grid.max())
    if high < 1.2 * low:  # a scale needs a range even where all heads agree
        low, high = low / 1.2, high * 1.2
    figure = _figure(max(5.0, 0.3 * count + 2.0), max(2.4, 0.3 * heads + 1.6))
    axes = figure.add_subplot()
    image = axes.imshow(grid, norm=LogNorm(low, high), cmap="cividis", aspect="auto", origin="lower")
    axes.set(title=title, xlabel="layer", ylabel="KV head")
    axes.set_xticks(
        range(0, count, max(1, count // 15)), [str(layers[i]) for i in range(0, count, max(1, count // 15))]
    )
    axes.set_yticks(range(0, heads, max(1, heads // 8)))
    _colour_bar(figure, image, axes, label)
    _save(figure, path)


def kept_tokens(
    lifetimes: "torch.Tensor", held: "torch.Tensor", path: Path | IO[bytes], *, layers: Sequence[int], title: str
) -> None:
    """Which tokens each head keeps: blue says for how long, black that a token is still held at the end.

    Args:
        lifetimes: steps from a token's creation to its eviction, [layers, H, T].
        held: bool, whether it is held after the last step, [layers, H, T].
    """
    from matplotlib import colormaps
    from matplotlib.colors import ListedColormap, LogNorm

    blues = ListedColormap([colormaps["Blues"](0.05 + 0.0065 * i) for i in range(100)])  # its darkest is near black
    black = ListedColormap(["#00000000", "#000000"])  # see-through where evicted
    count, heads, tokens = lifetimes.shape
    grid = lifetimes.flatten(0, 1).double().numpy()
    still = held.flatten(0, 1).numpy()
    figure = _figure(11.0, min(14.0, max(4.5, 0.09 * count * heads + 2.5)))
    share, axes = figure.subplots(2, 1, sharex=True, height_ratios=[1, 5])
    share.fill_between(range(tokens), held.double().mean((0, 1)).numpy(), step="mid", color="#000000", linewidth=0)
    share.set(title=title, ylabel="heads that\nkeep it", ylim=(0, 1.02))
    share.yaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
    image = axes.imshow(
        grid, norm=LogNorm(1, max(2.0, float(grid.max()))), cmap=blues, aspect="auto", interpolation="nearest"
    )
    axes.imshow(still, cmap=black, vmin=0, vmax=1, aspect="auto", interpolation="nearest")
    step = max(1, math.ceil(count / 15))
    axes.set_yticks(
        [i * heads + (heads - 1) / 2 for i in range(0, count, step)], [str(layers[i]) for i in range(0, count, step)]
    )
    axes.set(xlabel="token (position in the text)", ylabel=f"layer ({heads} KV head{'s' * (heads > 1)} each)")
    _colour_bar(figure, image, axes, "steps until eviction\n(black: kept to the end)")
    _save(figure, path)


def _draw_scores(
    axes: Any,
    summaries: "list[Summary]",
    task: str,
    length: int | None,
    *,
    series: Sequence[str] | None,
    sizes: dict[Any, int] | None,
) -> None:
    metric = metric_of(task)
    bounded = [summary for summary in summaries if summary.policy != FULL_CACHE]
    kinds = list(dict.fromkeys((summary.policy, summary.budgets) for summary in bounded))
    for index, kind in enumerate(kinds):
        style = style_of(*kind)
        line = sorted((s for s in bounded if (s.policy, s.budgets) == kind), key=lambda s: s.memory_size or 0)
        # a little aside, so that error bars of one memory size don't hide each other
        aside = 1.0 if sizes else 1.008 ** (index - len(kinds) / 2)
        drawn = axes.errorbar(
            [_memory(summary, sizes) * aside for summary in line],
            [summary.scores[metric].mean for summary in line],
            yerr=[summary.scores[metric].standard_error or 0.0 for summary in line],
            label=contender_name(*kind),
            color=style.colour,
            marker=style.marker,
            markersize=6 if style.colour == GATES_COLOUR else 4.5,
            linestyle=style.dashes,
            linewidth=style.width,
            elinewidth=1,
            capsize=2,
            zorder=3 if style.colour == GATES_COLOUR else 2,
        )
        if series is not None:
            place = series.index(contender_name(*kind))
            for number, artist in enumerate(drawn.get_children()):
                artist.set_gid(f"series-{place}-{number}")
    front = pareto_front(metric, [(_memory(summary, sizes), summary) for summary in bounded])
    if len(front) > 1:
        xs, ys = [x for x, _ in front], [summary.scores[metric].mean for _, summary in front]
        axes.step(xs, ys, where="post", color="#bbbbbb", linewidth=6, alpha=0.6, zorder=1, label="Pareto front")
    full = next((s.scores[metric].mean for s in summaries if s.policy == FULL_CACHE), None)
    if metric == "kl":
        axes.set_yscale("log")
        _plain_ticks(axes.yaxis)
    elif full is not None:
        axes.axhline(full, color="#000000", linestyle=":", label=FULL_CACHE_LABEL)
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


def _figure(width: float, height: float) -> Any:
    """A figure of its own, so that neither pyplot's state nor its choice of back end is touched. Inches."""
    require_matplotlib()
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _colour_bar(figure: Any, image: Any, axes: Any, label: str) -> None:
    bar = figure.colorbar(image, ax=axes, label=label, pad=0.02)
    bar.ax.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    # between the powers of ten only 2 and 5 have room
    bar.ax.yaxis.set_minor_formatter(lambda value, _: f"{value:g}" if f"{value:e}"[0] in "25" else "")


def _save(figure: Any, path: Path | IO[bytes]) -> None:
    figure.savefig(path, dpi=150, format="png")


def _svg(figure: Any) -> str:
    """As an element for a page: letters are shapes, so that nothing is clipped where a font is missing."""
    from matplotlib import rc_context

    buffer = io.StringIO()
    with rc_context({"svg.fonttype": "path"}):
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    text = buffer.getvalue()
    text = re.sub(r"<metadata>.*?</metadata>", "", text[text.index("<svg") :], flags=re.DOTALL)
    # parts that are named alike in every figure; ids of clip paths, markers and letters are unique or the same
    return re.sub(r' id="(figure|axes|patch|text|matplotlib\.axis|xtick|ytick|line2d|LineCollection)_\d+"', "", text)
