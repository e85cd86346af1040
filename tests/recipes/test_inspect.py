"""retention-gates inspect: numbers that a bounded cache agrees with, pictures, and a page that hides no script."""

import json
import re
from html.parser import HTMLParser

import pytest
import torch
from gated_models import gated_model, token_ids
from tiny_adapter import Files, make_files

from retention_gates import record
from retention_gates.cli import main
from retention_gates.gates.cache import BoundedCache
from retention_gates.recipes.report import gate_maps
from retention_gates.recipes.report.figures import save_png
from retention_gates.recipes.report.gate_reading import Reading, median_half_lives, read_text, telling_head
from retention_gates.recipes.report.token_page import token_page


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> Files:
    return make_files(tmp_path_factory.mktemp("inspect"))


class Page(HTMLParser):
    """The text of each token, and the data of the script."""

    def __init__(self, text: str):
        super().__init__()
        self.tokens: list[str] = []
        self.scripts: list[str] = []
        self.title = ""
        self.inside: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        if tag == "div" and dict(attrs).get("id") == "text":
            self.inside.append("text")
        elif tag == "span" and "text" in self.inside:
            self.tokens.append("")
            self.inside.append("token")
        elif tag in ("script", "title"):
            self.inside.append(tag)
            self.scripts += [""] if tag == "script" else []

    def handle_endtag(self, tag):
        if self.inside and (tag in ("script", "title") or tag in ("span", "div")):
            self.inside.pop() if tag != "span" or self.inside[-1] == "token" else None

    def handle_data(self, data):
        kind = self.inside[-1] if self.inside else ""
        if kind == "token":
            self.tokens[-1] += data
        elif kind == "script":
            self.scripts[-1] += data
        elif kind == "title":
            self.title += data

    @property
    def data(self) -> dict:
        (script,) = self.scripts
        return json.loads(re.search(r"const data = (.*);\n", script).group(1))


def test_what_is_read_is_what_a_bounded_cache_keeps():
    model, ids = gated_model(), token_ids(1, 50)
    reading = read_text(model, ids[0], memory_size=8, budgets="uniform")
    assert reading.budgets == [[8, 8]] * 4 and reading.tokens == 50
    cache = BoundedCache(model, 8, budgets="uniform")
    with torch.no_grad():
        for t in range(50):
            if t:
                for layer, times in zip(cache.gated_layers, reading.eviction_times, strict=True):
                    for head in range(2):
                        held = [p for p in layer.positions(head)[0].tolist() if p >= 0]
                        assert held == [i for i in range(t) if times[head, i] > t]
            model(input_ids=ids[:, t : t + 1], past_key_values=cache)
    assert bool(reading.half_lives[..., :2].isinf().all()) and bool(reading.half_lives[..., 2:].isfinite().all())


def test_half_lives_are_those_that_the_gates_say():
    model, rows = gated_model(), token_ids(2, 31)
    expected = []
    with torch.no_grad(), record(model) as recording:
        model(input_ids=rows, use_cache=False)
    for log_beta in recording.log_beta:  # [2, 2, 31], the first two tokens protected
        lives = torch.log(torch.tensor(0.5)) / log_beta[:, :, 2:]
        expected.append([lives[:, head].flatten().sort().values[(lives[:, head].numel() - 1) // 2] for head in (0, 1)])
    assert torch.allclose(median_half_lives(model, rows), torch.tensor(expected), rtol=1e-4)


def test_the_command_writes_pictures_and_a_page(files, tmp_path):
    from matplotlib.image import imread

    shown, out = tmp_path / "shown.txt", tmp_path / "out"
    shown.write_text("the old ship <b> sings & runs " * 9, encoding="utf-8-sig")
    arguments = [*files.arguments, "--length", "40", "--rows", "2", "--memory-size", "8", "--output", str(out)]
    assert main(["inspect", *arguments, "--show", str(shown)]) == 0
    pictures = ["half_life.png", "kept_tokens.png", "retained_mass.png"]
    assert sorted(path.name for path in out.iterdir()) == [".retention-gates", *pictures, "tokens.html"]
    for name in pictures:
        picture = imread(out / name)
        assert min(picture.shape[:2]) > 300
        assert len({tuple(pixel) for pixel in picture[::3, ::3, :3].reshape(-1, 3).round(1)}) > 10
    page = Page((out / "tokens.html").read_text(encoding="utf-8"))
    assert page.tokens[:4] == ["<|endoftext|>", "the", "old", "ship"] and len(page.tokens) == 40
    assert page.title == "model, gates of adapter" and page.data["memory_size"] == 8
    assert page.data["layers"] == [0, 1, 2, 3] and page.data["budgets"] == [[8, 8]] * 4
    assert [len(row) for layer in page.data["half_lives"] for row in layer] == [40] * 8
    assert page.data["half_lives"][0][0][:4] == [None] * 4 and page.data["eviction_times"][0][0][0] == 40


LIFETIMES = {  # of 64 tokens with a budget of 8
    "a sliding window": [8] * 64,
    "the first ones for ever": [100] * 8 + [1] * 56,
    "some of every kind": [1, 2, 4, 8, 16, 32, 100, 100] * 8,
}


@pytest.mark.parametrize("order", [[0, 1, 2], [2, 1, 0], [1, 2, 0]])
@pytest.mark.parametrize(("budgets", "near"), [([8, 8, 8], [0, 1, 2]), ([2, 2, 20], [2]), ([9, 20, 10], [0, 2])])
def test_the_page_opens_on_a_head_with_something_to_see(order, budgets, near):
    lifetimes = torch.tensor([list(LIFETIMES.values())[kind] for kind in order])[None]
    times = (lifetimes + torch.arange(64)).clamp(max=64)
    head = max(near, key=lambda head: order[head])
    assert telling_head(Reading(torch.ones(1, 3, 64), times, [budgets])) == (0, head)


def test_the_page_opens_where_it_says(files, tmp_path):
    reading = read_text(gated_model(), token_ids(1, 50)[0], memory_size=8, budgets="uniform")
    layer, head = telling_head(reading)
    options = {"layers": [3, 5, 7, 9], "budgets": reading.budgets, "opens_on": (layer, head), "memory_size": 8}
    text = token_page(["a"] * 50, reading.half_lives, reading.eviction_times, **options, title="a title")
    assert Page(text).data["opens_on"] == [layer, head]
    assert f"Opens on layer {[3, 5, 7, 9][layer]}, KV head {head}: of the heads" in text
    assert "layer.value = data.opens_on[0]; head.value = data.opens_on[1];" in text


def test_text_cannot_become_markup():
    words = ["</span><script>alert(1)</script>", "a & b", '"<i>', "$DATA", "$TOKENS", "line\n"]
    lives = torch.rand(1, 1, 6) * 9 + 1
    title = "</title><script>$DATA $TOKENS"
    times, options = torch.full((1, 1, 6), 6), {"layers": [3], "budgets": [[4]], "opens_on": (0, 0), "memory_size": 4}
    page = Page(token_page(words, lives, times, **options, title=title))
    assert page.tokens == [*words[:5], "line↵\n"]
    assert page.title == title and len(page.scripts) == 1
    assert page.data["half_lives"][0][0] == pytest.approx(lives[0, 0].tolist(), rel=5e-3)


@pytest.mark.parametrize("spread", [False, True])
def test_heat_maps_of_any_shape(tmp_path, spread):
    for layers, heads in ((1, 1), (30, 3), (36, 8)):
        values = (
            torch.logspace(0, 6, layers * heads).view(layers, heads) if spread else torch.full((layers, heads), 5.0)
        )
        path = tmp_path / f"{layers}.png"
        save_png(gate_maps.heat_map(values, layers=range(layers), title="a title", label="tokens"), path)
        assert path.stat().st_size > 5000
