"""retention-gates evaluate CONFIG.yaml: several models, resuming, the page, and what is refused."""

import json
import re
import shlex
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import pytest
import yaml
from tiny_adapter import Files, make_files

from retention_gates.checkpoints.evaluation_files import report_of
from retention_gates.cli import main
from retention_gates.recipes.comparison import fingerprints, scoring
from retention_gates.recipes.comparison.comparison_config import build_comparison, read_comparison
from retention_gates.recipes.loading import packaged_models
from retention_gates.recipes.loading.packaged_models import find_packaged
from retention_gates.recipes.loading.run_config import load_config
from retention_gates.trainers.evaluation import answers, forward_passes, text

ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> Files:
    files = make_files(tmp_path_factory.mktemp("compare"))
    assert main(["calibrate", *files.arguments, "--length", "96", "--rows", "2"]) == 0
    return files


def write_config(files: Files, folder: Path) -> Path:
    comparison = {
        "models": {"gated": {"adapter": str(files.adapter)}, "bare <b>": {"name": str(files.model)}},
        "text": {"source": str(files.texts), "rows": 2, "length": 120},
        "tasks": {"passage_repeat": {"lengths": [220, 260], "examples": 2}},
        "contenders": {"policies": ["streaming_llm", "random"], "memory_sizes": [16, 32], "budgets": ["uniform"]},
        "run": {"seeds": [0, 3], "batch_size": 2, "output": str(folder / "out")},
    }
    path = folder / "comparison.yaml"
    path.write_text(yaml.safe_dump(comparison), encoding="utf-8")
    return path


GATES = ["models.bare <b>=", "contenders.policies=[retention, random]", "contenders.extra=[retention/calibrated]"]


def lines(folder: Path, kind: str) -> list[dict]:
    found = map(json.loads, (folder / "results.jsonl").read_text(encoding="utf-8").splitlines())
    return [line for line in found if line["kind"] == kind]


@pytest.fixture
def passes(monkeypatch) -> list[int]:
    """Rows of each forward pass of a contender or the full cache."""
    counted: list[int] = []
    original = forward_passes.hidden_states

    def counting(gated, ids, chosen, seed, progress, *rest):
        counted.append(len(ids) * (1 + len(chosen)))
        return original(gated, ids, chosen, seed, progress, *rest)

    for module in (text, answers):
        monkeypatch.setattr(module, "hidden_states", counting)
    return counted


@pytest.fixture
def undrawn(monkeypatch) -> None:
    """Leaves out the page, whose pictures take longer than the tiny models."""
    monkeypatch.setattr("retention_gates.recipes.report.html_page.page", lambda header, models: "")


def test_two_models_seeds_and_lengths(files, tmp_path, passes):
    assert main(["evaluate", str(write_config(files, tmp_path))]) == 0
    out = tmp_path / "out"
    records = lines(out, "record")
    assert {r["model"] for r in records} == {"gated", "bare <b>"}
    cells = {(r["model"], r["task"], r["length"], r["seed"], r["row"], r["policy"], r["memory_size"]) for r in records}
    blocks = (("text", 120), ("passage_repeat", 220), ("passage_repeat", 260))
    assert len(cells) == len(records) == 2 * len(blocks) * 2 * 2 * (1 + 4)
    assert {(task, length) for _, task, length, *_ in cells} == set(blocks)
    # the second model is the first without its gates, on which none of these policies depends
    assert sum(passes) == len(records) / 2
    gated, bare = [[r | {"model": None} for r in records if r["model"] == m] for m in ("gated", "bare <b>")]
    assert gated == bare
    text = [r for r in records if r["task"] == "text" and r["policy"] == "full"]
    assert len({r["nll"] for r in text}) > 2, "seeds draw other passages"
    card = report_of(out, files.adapter, "user/adapter")
    assert "## gated: Text" in card and "adapter `adapter`" in card and "bare <b>" not in card
    assert str(files.adapter.parent) not in card
    assert "<b>" not in Page((out / "report.html").read_text(encoding="utf-8")).tags


def test_a_stopped_run_goes_on_and_a_second_one_is_free(files, tmp_path, passes, undrawn, monkeypatch, capsys):
    config, out = str(write_config(files, tmp_path)), tmp_path / "out"
    compute, calls = scoring.Scorer._compute, []

    def stopping(*arguments):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return compute(*arguments)

    monkeypatch.setattr(scoring.Scorer, "_compute", stopping)
    assert main(["evaluate", config, *GATES]) == 130
    assert [path.name for path in out.iterdir() if path.suffix] == ["scores.jsonl"]
    done = sum(passes)
    monkeypatch.setattr(scoring.Scorer, "_compute", compute)
    assert main(["evaluate", config, *GATES]) == 0
    records = lines(out, "record")
    assert 0 < done < sum(passes) == len(records)
    capsys.readouterr()

    before, total = {path.name: path.read_bytes() for path in out.iterdir()}, len(passes)
    assert main(["evaluate", config, *GATES]) == 0
    assert len(passes) == total and lines(out, "record") == records
    assert before["scores.jsonl"] == (out / "scores.jsonl").read_bytes()
    # one more memory size: only it is computed, with the full cache that it is compared with
    assert main(["evaluate", config, *GATES, "--memory-size", "16", "24", "32"]) == 0
    assert sum(passes[total:]) == len(records) / 7 * (1 + 3)
    assert "are computed" in capsys.readouterr().out


def test_other_gates_texts_and_code_are_computed_anew(files, tmp_path, passes, undrawn, monkeypatch):
    config = str(write_config(files, tmp_path))
    shared = ["tasks=", "run.seeds=[0]", "contenders.memory_sizes=[16]"]
    assert main(["evaluate", config, *GATES, *shared]) == 0
    first = sum(passes)
    assert main(["evaluate", config, *GATES, *shared, "text.start=20"]) == 0
    assert sum(passes) == 2 * first, "the scores from another position on are others"
    assert main(["evaluate", config, *GATES, *shared, "run.batch_size=1"]) == 0
    assert sum(passes) == 2 * first
    monkeypatch.setattr(fingerprints, "CODE", ("gates",))
    assert main(["evaluate", config, *GATES, *shared]) == 0
    assert sum(passes) == 3 * first


class Page(HTMLParser):
    """The tags of a page, and whatever it would load from elsewhere."""

    def __init__(self, text: str):
        super().__init__()
        self.tags: list[str] = []
        self.loads: list[str] = []
        self.text = ""
        self.ids: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append(f"<{tag}>")
        self.ids += [value for name, value in attrs if name == "id"]
        for name, value in attrs:
            if name in ("src", "href", "xlink:href", "data", "srcset") and not value.startswith(("#", "data:")):
                self.loads.append(value)

    def handle_data(self, data):
        self.text += data


def test_the_page_is_whole_and_loads_nothing(files, tmp_path):
    config, out = str(write_config(files, tmp_path)), tmp_path / "out"
    assert main(["evaluate", config, *GATES, "run.seeds=[0]", "contenders.reference=random"]) == 0
    text = (out / "report.html").read_text(encoding="utf-8")
    page = Page(text)
    assert page.loads == [] and "@import" not in text and not re.search(r"url\((?!#|\"?#)", text)
    assert not re.search(r"\$[A-Z]", page.text), "nothing is left of the template"
    order = [
        "Main findings",
        "What was compared",
        "Text: how far",
        "Recall tasks: share",
        "Answers that differ",
        "Half-life",
    ]
    places = [text.index(heading) for heading in order]
    assert places == sorted(places)
    for part in ("nats per token", "Pareto front", "gates, calibrated", "p (mean)", "MiB"):
        assert part in page.text
    assert page.tags.count("<svg>") == 3 + 4 + 2, (
        "a swatch for each contender, panels of entries, bytes and tasks, maps"
    )
    for series in range(3):
        assert sum(name.startswith(f"series-{series}-") for name in page.ids) >= 4


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["text.rows=0"], "text.rows=0 must be"),
        (["text.row=2"], "text.row is no option of a comparison; the nearest is text.rows"),
        (["texts.rows=2"], "the nearest is text"),
        (["rows"], "must read section.key=value"),
        (["run.output="], "run.output is missing"),
        (["run.seeds=[]"], "run.seeds=[] must be one or more"),
        (["run.seeds=[1, 1]"], "must be one or more different numbers"),
        (["run.matmul_precision=low"], "choose among highest, high"),
        (["run.batch_size=two"], "is a str, where int is wanted"),
        (["tasks.chess.examples=2"], "unknown task 'chess'"),
        (["tasks.passkey.lengths=[1]"], "tasks.passkey.lengths=1 must be"),
        (["tasks.passkey=4"], "must be a mapping"),
        (["models="], "models is empty"),
        (["models.gated.package=os_path"], "'os_path' with the base model is not installed"),
        (["models.gated.package=os", "models.gated.name=x"], "stands instead of"),
        (["contenders.policies=[retention]"], "needs trained gates"),
        (["contenders.extra=[random]"], "must read POLICY/BUDGETS"),
        (["contenders.extra=[random/even]"], "'even' is unknown"),
        (["contenders.extra=[random/uniform]"], "is among them already"),
        (["contenders.memory_sizes=[200]"], "no longer than the largest memory"),
        (["text.test_fraction=0.5", "text.test_works=[work1]"], "give one of them"),
        (["--adapter", "x"], "models.NAME.adapter"),
    ],
)
def test_mistakes(files, arguments, message, tmp_path, capsys):
    config = write_config(files, tmp_path)
    assert main(["evaluate", str(config), *arguments]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_neither_file_nor_folder(files, capsys):
    assert main(["evaluate", "--adapter", str(files.adapter)]) == 2
    assert "a folder for the results" in capsys.readouterr().err
    assert main(["evaluate", "nowhere.yaml"]) == 2
    assert "nowhere.yaml cannot be read" in capsys.readouterr().err


def test_a_package_that_holds_a_model(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    code = {
        "whole_model": "raise ImportError('not to be imported')",
        "parts_of_model": f"assemble = lambda: {str(tmp_path / 'made.gguf')!r}",
    }
    for name in code:
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text(code[name], encoding="utf-8")
    with pytest.raises(ValueError, match="should hold one GGUF file and has none"):
        find_packaged("json")
    (tmp_path / "whole_model" / "small.gguf").touch()
    assert find_packaged("whole_model") == (str(tmp_path / "whole_model"), "small.gguf")
    assert find_packaged("parts_of_model") == (str(tmp_path), "made.gguf")


def test_make_compare_trains_what_is_missing(monkeypatch):
    printed = subprocess.run(
        ["make", "--dry-run", "--always-make", "compare"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout
    commands = [shlex.split(line) for line in printed.replace("\\\n", " ").splitlines() if "retention_gates" in line]
    *trainings, comparing = [command[command.index("retention_gates") + 1 :] for command in commands]
    assert comparing == ["evaluate", "recipes/runs/compare_smollm2.yaml"]
    monkeypatch.setattr(packaged_models, "find_packaged", lambda package: (package, "a.gguf"))
    given = build_comparison(read_comparison(ROOT / comparing[1], []))
    runs = [load_config(ROOT / path, overrides) for _, path, *overrides in trainings]
    trained = {run.model.package: f"{run.training.output_dir}/adapter" for run in runs}
    assert trained == {entry.package: entry.adapter for entry in given.models.values()}
    for run in runs:
        assert (run.data.test_fraction, run.data.split_seed) == (given.text.test_fraction, given.text.split_seed)


def test_the_shipped_comparison(monkeypatch):
    monkeypatch.setattr(packaged_models, "find_packaged", lambda package: (package, "a.gguf"))
    comparison = build_comparison(read_comparison(ROOT / "recipes" / "runs" / "compare_smollm2.yaml", []))
    assert len(comparison.run.seeds) >= 3 and comparison.contenders.memory_sizes == [32, 64, 128, 256]
    assert set(comparison.models) == {"SmolLM2-135M", "Gemma-3-270M"} and comparison.start == 256
