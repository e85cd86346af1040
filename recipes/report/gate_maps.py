"""Maps of what gates have learnt, layers down: narrow enough for a telephone, and for two of them side by side."""

import math
from collections.abc import Sequence
from textwrap import fill
from typing import Any

import torch

from retention_gates.recipes.report.figures import BLACK, new_figure

WIDTH = 4.5  # inches, as the panels of scores: letters of a page are then as large in all pictures
TITLE_LETTERS = 44  # of a line
DPI = 240  # of PNG files: 1,080 pixels across


def heat_map(values: "torch.Tensor", *, layers: Sequence[int], title: str, label: str) -> Any:
    """A figure with one cell for each layer and KV head on a logarithmic scale.

    Args:
        values: positive, [layers, H], in the unit that `label` names.
        layers: the layers' indices in the model.
    """
    from matplotlib.colors import LogNorm

    grid = values.double().numpy()
    count, heads = grid.shape
    low, high = float(grid.min()), float(grid.max())
    if high < 1.2 * low:  # a scale needs a range even where all heads agree
        low, high = low / 1.2, high * 1.2
    figure = new_figure(WIDTH, min(10.0, max(1.0, 0.16 * count)) + 1.6)
    axes = figure.add_subplot()
    image = axes.imshow(grid, norm=LogNorm(low, high), cmap="cividis", aspect="auto", interpolation="none")
    _set_title(axes, title)
    axes.set(xlabel="KV head", ylabel="layer")
    axes.set_xticks(range(0, heads, math.ceil(heads / 16)))
    step = math.ceil(count / 30)
    axes.set_yticks(range(0, count, step), [str(layers[i]) for i in range(0, count, step)], fontsize=8)
    _scale_below(figure, image, axes, label)
    return figure


def kept_tokens(lifetimes: "torch.Tensor", held: "torch.Tensor", *, layers: Sequence[int], title: str) -> Any:
    """A figure of which tokens each head keeps: blue says for how long, black that a token is held at the end.

    Args:
        lifetimes: steps from a token's creation to its eviction, [layers, H, T].
        held: bool, whether it is held after the last step, [layers, H, T].
    """
    from matplotlib import colormaps
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import ListedColormap, LogNorm

    blues = ListedColormap([colormaps["Blues"](0.05 + 0.0065 * i) for i in range(100)])  # its darkest is near black
    count, heads, tokens = lifetimes.shape
    grid = lifetimes.flatten(0, 1).double().numpy()
    norm = LogNorm(1, max(2.0, float(grid.max())))
    cells = blues(norm(grid))  # [layers * H, T, 4]
    cells[held.flatten(0, 1).numpy()] = (0.0, 0.0, 0.0, 1.0)
    figure = new_figure(WIDTH, min(10.0, max(2.5, 0.055 * count * heads)) + 2.4)
    share, axes = figure.subplots(2, 1, sharex=True, height_ratios=[1, 5])
    share.fill_between(range(tokens), held.double().mean((0, 1)).numpy(), step="mid", color=BLACK, linewidth=0)
    share.set(ylabel="heads that\nkeep it", ylim=(0, 1.02))
    share.yaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
    _set_title(share, title)
    axes.imshow(cells, aspect="auto", interpolation="none")
    step = math.ceil(count / 15)
    axes.set_yticks(
        [i * heads + (heads - 1) / 2 for i in range(0, count, step)], [str(layers[i]) for i in range(0, count, step)]
    )
    axes.set(xlabel="token (position in the text)", ylabel=f"layer ({heads} KV head{'s' * (heads > 1)} each)")
    _scale_below(figure, ScalarMappable(norm, blues), axes, "steps until eviction (black: kept to the end)")
    return figure


def _set_title(axes: Any, title: str) -> None:
    axes.set_title("\n".join(fill(line, TITLE_LETTERS) for line in title.splitlines()), fontsize=10)


def _scale_below(figure: Any, image: Any, axes: Any, label: str) -> None:
    bar = figure.colorbar(image, ax=axes, label=label, location="bottom", pad=0.02, aspect=40)
    bar.ax.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    # between the powers of ten only 2 and 5 have room
    bar.ax.xaxis.set_minor_formatter(lambda value, _: f"{value:g}" if f"{value:e}"[0] in "25" else "")
