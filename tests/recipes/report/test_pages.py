"""Pages: colours by day and by night, and first sentences that say what is measured."""

import re

import pytest

from retention_gates.recipes.report import evaluation_report, html_page, page_template, token_page
from retention_gates.recipes.report.contents import ModelReport
from retention_gates.recipes.report.page_head import HEAD
from retention_gates.trainers.evaluation.paired_statistics import Score, Summary

PAGES = [page_template.PAGE, token_page.PAGE]
# letters and what they stand on
READ = [("ink", "paper"), ("soft", "paper"), ("link", "paper"), ("wrong", "paper"), ("ink", "warm"), ("soft", "warm"),
        ("ink", "lit"), ("ink", "asked")]  # fmt: skip


def palettes() -> tuple[dict[str, str], dict[str, str]]:
    """Names and colours by day and by night."""
    day, night = HEAD.split("@media (prefers-color-scheme: dark)")
    return tuple(dict(re.findall(r"--(\w+): ([^;]+);", part)) for part in (day, night))


def luminance(colour: str) -> float:
    digits = colour.strip().lstrip("#")
    digits = "".join(2 * digit for digit in digits) if len(digits) == 3 else digits
    parts = [int(digits[i : i + 2], 16) / 255 for i in (0, 2, 4)]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(one: str, other: str) -> float:
    high, low = sorted((luminance(one), luminance(other)), reverse=True)
    return (high + 0.05) / (low + 0.05)


def test_letters_can_be_read_by_day_and_by_night():
    day, night = palettes()
    assert day.keys() == night.keys() and luminance(day["paper"]) > 0.9 and luminance(night["paper"]) < 0.02
    for colours in (day, night):
        assert min(contrast(colours[one], colours[other]) for one, other in READ) >= 4.5
        assert contrast(colours["gates"], colours["paper"]) >= 3


@pytest.mark.parametrize("page", PAGES)
def test_pages_have_no_colours_beside_those(page):
    assert page.startswith(HEAD) and "color-scheme" in HEAD
    rest = page.removeprefix(HEAD)
    assert not re.search(r"#[0-9a-fA-F]{3,8}\b[^(]*;|rgba?\((?!var)|:\s*(white|black)", rest)
    used = set(re.findall(r"var\(--(\w+)\)", page))
    assert used and used <= set(palettes()[0])


def report(sizes: list[int]) -> ModelReport:
    def summary(policy: str, size: int | None, mean: float) -> Summary:
        scores = {"kl": Score(mean, 0.01, None)}
        return Summary("text", 512, policy, size, None if size is None else "uniform", 4, scores)

    kinds = [(policy, size) for policy in ("h2o", "snapkv", "tova") for size in sizes]
    facts = dict.fromkeys(("model", "retention_gates", "device", "dtype", "torch", "transformers"), "x")
    facts |= {"adapter": None, "gguf_file": None, "commit": None, "left_out": []}
    return ModelReport(
        title="Tiny <model>", facts=facts, records=[], reference=None, gated=[], shown=None, answers=[],
        summaries=[summary("full", None, 0.0), *(summary(policy, size, 9 / size) for policy, size in kinds)],
        bytes={None: 2**24, **{(policy, size, "uniform"): size * 2**10 for policy, size in kinds}},
    )  # fmt: skip


HEADER = {"seeds": [0], "rows": 4, "length": 512, "text": "plays", "held_out": "", "start": 0, "tasks": {},
          "time": "now", "seconds": 1.0}  # fmt: skip


def test_kl_and_nats_are_explained_before_anything_else():
    models = [report([32, 64])]
    page = html_page.page(HEADER, models)
    first = page[page.index("</h1>") : page.index("<section")]
    markdown = evaluation_report.markdown(HEADER, models)
    for text in (first, markdown[: markdown.index("**Tiny")]):
        for part in (
            "KL divergence from the full cache",
            "nats per token",
            "0 is no loss",
            "exp(-0.1) = 0.90",
            "32 or 64",
        ):
            assert part in text
    assert "Tiny &lt;model&gt;" in page and "<model>" not in page


def test_the_steps_are_explained_below_their_plot():
    page = html_page.page(HEADER, [report([32, 64])])
    captions = re.findall(r"<figcaption>(.*?)</figcaption>", page)
    assert any("grey steps are the Pareto front" in caption for caption in captions)
    assert any("No other policy is better with the same bytes or fewer" in caption for caption in captions)
    assert "best 3 of the others in each plot" in page


def test_what_is_singled_out_gets_its_colour_back():
    assert 'g[id$="-grey"] { filter: grayscale(1);' in page_template.PAGE
    assert 'part.style.filter = lit ? "none" : "";' in page_template.PAGE
