"""Pictures of evaluations and of gates, as PNG files."""

import math
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

    from retention_gates.trainers.comparison import Summary

# Okabe and Ito's colours: told apart with any colour vision. Markers and dashes differ as well, for print.
COLOURS = ("#D55E00", "#0072B2", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS = "oDs^vPX"
FULL_CACHE, TEXT = "full", "text"
PANELS = {"text": ("kl", "KL to the full cache (nats per token)"), "task": ("token_accuracy", "answer tokens right")}


def require_matplotlib() -> None:
    """Raises ValueError if pictures can't be drawn here."""
    if find_spec("matplotlib") is None:
        raise ValueError("Pictures need the package matplotlib: pip install 'retention-gates[demo]'.")


def score_against_memory(summaries: Sequence["Summary"], path: Path) -> None:
    """One panel for the text and one for each task: a line per policy and kind of budgets, the full cache dashed."""
    tasks = list(dict.fromkeys(summary.task for summary in summaries))
    figure = _figure(max(6.4, 4.6 * len(tasks) + 0.4), 4.8)
    for index, task in enumerate(tasks):
        axes = figure.add_subplot(1, len(tasks), index + 1)
        metric, label = PANELS["text" if task == TEXT else "task"]
        _score_panel(axes, [s for s in summaries if s.task == task], metric)
        axes.set(title="Text" if task == TEXT else f"Task {task}", xlabel="entries per KV head (mean)", ylabel=label)
        if index == 0:
            handles, labels = axes.get_legend_handles_labels()
            figure.legend(
                handles, labels, loc="outside lower center", ncols=min(len(labels), 2 * len(tasks)), frameon=False
            )
    _save(figure, path)


def heat_map(values: "torch.Tensor", path: Path, *, layers: Sequence[int], title: str, label: str) -> None:
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
    lifetimes: "torch.Tensor", held: "torch.Tensor", path: Path, *, layers: Sequence[int], title: str
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


def _score_panel(axes: Any, summaries: Sequence["Summary"], metric: str) -> None:
    full = [summary for summary in summaries if summary.policy == FULL_CACHE]
    bounded = [summary for summary in summaries if summary.policy != FULL_CACHE]
    for index, (policy, budgets) in enumerate(dict.fromkeys((s.policy, s.budgets) for s in bounded)):
        aside = 1.012 ** (index - 2)  # so that error bars of one memory size don't hide each other
        line = sorted(
            (s for s in bounded if (s.policy, s.budgets) == (policy, budgets)), key=lambda s: s.memory_size or 0
        )
        axes.errorbar(
            [(summary.memory_size or 0) * aside for summary in line],
            [summary.scores[metric].mean for summary in line],
            yerr=[summary.scores[metric].standard_error or 0.0 for summary in line],
            label=f"{policy}, {budgets}",
            color=COLOURS[index % len(COLOURS)],
            marker=MARKERS[index % len(MARKERS)],
            linestyle="-" if budgets == "calibrated" else "--" if policy != "retention" else "-.",
            capsize=3,
        )
    axes.axhline(full[0].scores[metric].mean, color="#000000", linestyle=":", label="full cache")
    sizes = sorted({summary.memory_size for summary in bounded if summary.memory_size is not None})
    axes.set_xscale("log", base=2)
    axes.set_xticks(sizes, [str(size) for size in sizes])
    axes.minorticks_off()
    if metric != "kl":
        axes.set_ylim(-0.03, 1.03)
    axes.grid(alpha=0.3)


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


def _save(figure: Any, path: Path) -> None:
    figure.savefig(path, dpi=150, format="png")
