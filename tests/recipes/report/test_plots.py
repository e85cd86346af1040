"""Pictures of scores and maps of gates: legends as the plots, few lines in colour, letters that fit a telephone."""

import random
import re

import numpy as np
import pytest
import torch

from retention_gates.recipes.report import gate_maps, plots
from retention_gates.recipes.report.contents import by_contender, contender_name
from retention_gates.recipes.report.figures import svg_of
from retention_gates.trainers.evaluation.paired_statistics import Score, Summary

TELEPHONE = 390  # pixels that a page of 420 has for a picture
RIVALS = ["h2o", "snapkv", "tova", "random", "streaming_llm", "keydiff", "rkv"]
GATES = [("retention", "uniform"), ("retention", "calibrated")]


def summaries(task: str, metric: str, seed: int = 0, rivals: list[str] = RIVALS) -> list[Summary]:
    """Scores of all contenders by chance, with the full cache."""
    rng = random.Random(f"{seed} {task}")
    full = {metric: Score(0.0 if metric == "kl" else 0.95, 0.01, None)}
    found = [Summary(task, 512, "full", None, None, 8, full)]
    for policy, budgets in [*GATES, *((rival, "uniform") for rival in rivals)]:
        for size in (32, 64, 128):
            scores = {metric: Score(rng.uniform(0.05, 0.9), 0.02, None)}
            found.append(Summary(task, 512, policy, size, budgets, 8, scores))
    return found


def both(seed: int = 0) -> list[Summary]:
    return summaries("text", "kl", seed) + summaries("passkey", "token_accuracy", seed)


def drawn(figure) -> np.ndarray:
    figure.canvas.draw()
    return np.asarray(figure.canvas.buffer_rgba())[..., :3].astype(int)


def test_a_dashed_line_is_dashed_in_the_legend():
    figure = plots.score_figure(both())
    pixels = drawn(figure)
    (legend,) = figure.legends
    handles = dict(zip([text.get_text() for text in legend.get_texts()], legend.legend_handles, strict=True))
    pieces = {}
    for name, handle in handles.items():
        if not name.startswith("gates"):
            continue
        box = handle.get_window_extent()
        row = pixels[pixels.shape[0] - 1 - round((box.y0 + box.y1) / 2), round(box.x0) : round(box.x1)]
        inked = np.abs(row - [213, 94, 0]).sum(-1) < 90
        assert box.x0 >= 0 and box.x1 <= figure.bbox.width
        pieces[name] = int(np.diff(inked.astype(int), prepend=0, append=0).clip(0).sum())
    assert pieces == {"gates, uniform": pieces["gates, uniform"], "gates, calibrated": 1}
    assert pieces["gates, uniform"] >= 3
    for axes in figure.axes:
        lines = {line.get_linestyle() for line in axes.lines if line.get_color() == plots.GATES_COLOUR}
        assert lines >= {"-", "--"}


@pytest.mark.parametrize("tasks", [[], ["passkey"], ["passkey", "codes"], ["passkey", "codes", "sentence_recall"]])
def test_the_legend_fits_its_picture(tasks):
    own = summaries("text", "kl") + [s for task in tasks for s in summaries(task, "token_accuracy")]
    figure = plots.score_figure(own)
    figure.canvas.draw()
    box = figure.legends[0].get_window_extent()
    assert box.x0 >= 0 and box.x1 <= figure.bbox.width
    assert all(axes.bbox.y0 > box.y1 for axes in figure.axes)


@pytest.mark.parametrize("seed", range(3))
def test_all_but_the_best_three_rivals_of_each_panel_are_grey(seed):
    own = both(seed)
    figure = plots.score_figure(own)
    names = [text.get_text() for text in figure.legends[0].get_texts()]
    shown: set[str] = set()
    for axes, (task, metric) in zip(figure.axes, (("text", "kl"), ("passkey", "token_accuracy")), strict=True):
        of_task = [summary for summary in own if summary.task == task]
        best = [name for name, by_size in by_contender(of_task, metric) if None not in by_size and "gates" not in name]
        shown |= set(best[:3])
        colours = plots.colours_of([("text", own[: len(own) // 2]), ("passkey", own[len(own) // 2 :])])
        colours = {contender_name(policy, "uniform"): colours[contender_name(policy, "uniform")] for policy in RIVALS}
        assert len({colours[name] for name in best[:3]}) == 3
        lines = [container.lines[0].get_color() for container in axes.containers]
        assert lines[: len(GATES)] == [plots.GATES_COLOUR] * 2
        assert lines[len(GATES) :] == [colours[name] if name in best[:3] else plots.GREY for name in colours]
    assert set(names) == shown | {"gates, uniform", "gates, calibrated"} | {
        plots.PARETO_LABEL,
        plots.FULL_CACHE_LABEL,
        plots.OTHERS_LABEL,
    }


def test_with_few_rivals_none_is_grey():
    own = summaries("text", "kl", rivals=RIVALS[:3])
    assert plots.grey_ones(own, "kl") == set()
    assert plots.OTHERS_LABEL not in [text.get_text() for text in plots.score_figure(own).legends[0].get_texts()]


def test_a_panel_of_a_page_marks_what_the_page_shows_in_grey():
    own = summaries("text", "kl")
    series = list(dict.fromkeys(contender_name(s.policy, s.budgets) for s in own if s.policy != "full"))
    svg = plots.score_panel(own, "text", 512, colours=plots.colours_of([("text", own)]), series=series)
    grey = {int(number) for number in re.findall(r'id="series-(\d+)-\d+-grey"', svg)}
    assert {series[number] for number in grey} == plots.grey_ones(own, "kl") and len(grey) == len(RIVALS) - 3
    assert {int(number) for number in re.findall(r'id="series-(\d+)-\d+"', svg)} == set(range(len(series))) - grey


def test_what_is_black_takes_the_colour_of_the_page():
    own = summaries("passkey", "token_accuracy")
    series = [contender_name(s.policy, s.budgets) for s in own]
    maps = gate_maps.heat_map(torch.rand(4, 2) + 1, layers=range(4), title="a <title>", label="tokens")
    colours = plots.colours_of([("passkey", own)])
    for svg in (plots.score_panel(own, "passkey", 512, colours=colours, series=series), svg_of(maps, 'a "map"')):
        assert not re.search(r"#000000|#000\b|#ffffff|black|white", re.sub(r"base64,[^\"]*", "", svg))
        assert svg.startswith('<svg fill="currentColor" role="img" aria-label=') and svg.count("currentColor") > 5
    assert "a &quot;map&quot;" in svg_of(maps, 'a "map"')


@pytest.mark.parametrize(("layers", "heads"), [(1, 1), (30, 3), (36, 8), (24, 2), (64, 32)])
def test_maps_can_be_read_on_a_telephone(layers, heads):
    from matplotlib.text import Text

    title = "What each head keeps of 2,048 tokens, at 128 entries on average"
    lifetimes = torch.randint(1, 300, (layers, heads, 400))
    maps = (
        gate_maps.heat_map(torch.rand(layers, heads) * 1e5 + 1, layers=range(layers), title=title, label="tokens"),
        gate_maps.kept_tokens(lifetimes, lifetimes > 250, layers=range(layers), title=title),
    )
    for figure in maps:
        figure.canvas.draw()
        scale = TELEPHONE / figure.bbox.width * figure.dpi / 72
        texts = [text for text in figure.findobj(Text) if text.get_visible() and text.get_text()]
        assert min(text.get_fontsize() for text in texts) * scale >= 9, "pixels"
        for axes in figure.axes:
            for axis in (axes.xaxis, axes.yaxis):
                labels = [t.get_window_extent() for t in axis.get_ticklabels() if t.get_visible() and t.get_text()]
                labels = [
                    box for box in labels if axes.bbox.padded(5).overlaps(box) or axes.bbox.padded(40).overlaps(box)
                ]
                assert not any(one.overlaps(other) for i, one in enumerate(labels) for other in labels[i + 1 :])
        (title_box,) = [text.get_window_extent() for text in texts if text.get_text().startswith("What each")]
        assert title_box.x0 >= 0 and title_box.x1 <= figure.bbox.width
