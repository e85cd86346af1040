"""retention-gates evaluate: its files and what stands in them, resuming, and what is refused."""

import json
from dataclasses import fields
from pathlib import Path

import pytest
from gated_models import gated_model
from tiny_adapter import Files, make_files

from retention_gates.cli import main
from retention_gates.gates.policies import POLICIES
from retention_gates.recipes.bench.harness import Measurement
from retention_gates.recipes.comparison.run import _unfit, can_run
from retention_gates.recipes.evaluate import _from_model
from retention_gates.trainers.evaluation.contenders import contenders
from retention_gates.trainers.evaluation.paired_statistics import aggregate, holm

OPTIONS = ["--documents", "3", "--length", "240", "--memory-size", "8", "32", "--examples", "2"]
RIVALS = ["streaming_llm", "random", "key_norm"]
CONTENDERS = ["gates, uniform", "gates, calibrated", "StreamingLLM", "random", "key norm"]


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> Files:
    files = make_files(tmp_path_factory.mktemp("evaluate"))
    assert main(["calibrate", *files.arguments, "--length", "96", "--rows", "2"]) == 0
    return files


@pytest.fixture(scope="module")
def evaluated(files, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("out") / "evaluation"
    arguments = [*files.arguments, *OPTIONS, "--tasks", "passage_repeat", "--test-works", "work1", "work3"]
    assert main(["evaluate", *arguments, "--policies", "retention", *RIVALS, "--output", str(folder)]) == 0
    return folder


@pytest.fixture(autouse=True)
def undrawn(monkeypatch) -> None:
    """Leaves out the page, whose pictures take longer than the tiny models; `evaluated` is made before this."""
    monkeypatch.setattr("retention_gates.recipes.report.html_page.page", lambda header, models: "")


def read(folder: Path) -> tuple[dict, list[dict]]:
    header, *records = [json.loads(line) for line in (folder / "results.jsonl").read_text().splitlines()]
    assert header.pop("kind") == "header"
    return header, [record for record in records if record.pop("kind") == "record"]


def model_facts(folder: Path) -> dict:
    (facts,) = [line for line in map(json.loads, (folder / "results.jsonl").open()) if line["kind"] == "model"]
    return facts


def test_results_have_a_record_of_each_row_and_contender(evaluated, files):
    header, records = read(evaluated)
    facts = model_facts(evaluated)
    assert facts["adapter"] == str(files.adapter) and facts["model"] == str(files.model)
    assert header["start"] == 32 and header["rows"] == 3 and header["held_out"] == "work1, work3"
    assert {"torch", "transformers", "peft", "retention_gates", "commit", "device"} <= set(facts)
    assert header["time"] and header["seconds"] > 0
    chosen = contenders(["retention"], [8, 32], ["uniform", "calibrated"])
    chosen += contenders(RIVALS, [8, 32], ["uniform"])
    for task, rows in (("text", 3), ("passage_repeat", 2)):
        named = [(r["row"], r["policy"], r["memory_size"], r["budgets"]) for r in records if r["task"] == task]
        expected = {(row, c.policy, c.memory_size, c.budgets) for row in range(rows) for c in chosen}
        assert len(named) == len(set(named)) and set(named) == expected | {
            (r, "full", None, None) for r in range(rows)
        }
    assert all(r["kl"] > 1e-3 for r in records if r["task"] == "text" and r["policy"] != "full")


def test_the_model_is_called_by_its_name(evaluated, files):
    text = (evaluated / "report.md").read_text()
    assert "- model: `model`, adapter" in text and str(files.model) not in text
    options = {"model": "/site/a_package", "gguf_file": "Model-1B.Q4_1.gguf"}
    assert _from_model({**options, "output": "out"}) == {
        "models": {"Model-1B": {"name": "/site/a_package", "gguf_file": "Model-1B.Q4_1.gguf"}}
    }


def cells(line: str) -> list[str]:
    return [cell.strip(" *") for cell in line.strip("|").split("|")]


def test_the_report_says_what_the_records_say(evaluated):
    _, records = read(evaluated)
    lines = (evaluated / "report.md").read_text().splitlines()
    summaries = aggregate(records, reference="streaming_llm")
    (calibrated,) = [s for s in summaries if (s.task, s.memory_size, s.budgets) == ("text", 32, "calibrated")]
    (line,) = [line for line in lines if line.startswith("| 32 | retention | calibrated |") and "of 3" in line]
    own = cells(line)
    for metric, cell in zip(("kl", "perplexity_ratio", "agreement"), own[3:6], strict=True):
        score = calibrated.scores[metric]
        assert cell == f"{score.mean:.3f} ± {score.standard_error:.3f}"
    pairing = calibrated.scores["kl"].pairing
    on_text = [s.scores["kl"].pairing for s in summaries if s.task == "text"]
    corrected = holm([p.p_mean for p in on_text if p])[[p for p in on_text if p].index(pairing)]
    assert own[6:9] == [f"{pairing.wins} of 3", f"{pairing.p_value:.2g}", f"{corrected:.2g}"]
    (sizes, *rows) = [
        cells(line) for line in lines[lines.index("## model: Text, 240 tokens") :] if line.startswith("|")
    ][:8]
    assert sizes == ["", "8", "32"]
    on_average = {row[0]: sum(float(cell.split()[0]) for cell in row[1:]) for row in rows[1:]}
    assert set(on_average) == {"full cache", *CONTENDERS} and list(on_average.values()) == sorted(on_average.values())
    assert {row[0]: row[2] for row in rows[1:]}["gates, calibrated"] == own[3]
    assert any(line.startswith("| all | full |  | 0.000 ± 0.000 | 1.000 ± 0.000 |") for line in lines)
    assert [line for line in lines if line.startswith("#")] == [
        "# Bounded memory against the full cache",
        "## What was compared",
        "## model: Text, 240 tokens",
        "## model: Passage repeat, 240 tokens",
        "## How to read this",
    ]
    tables = [[]]
    for line in lines:
        tables += [] if line.startswith("|") else [[]]
        tables[-1] += [line.count("|")] if line.startswith("|") else []
    assert all(len(set(table)) <= 1 for table in tables), "every line of a table has as many cells as its heading"


def test_the_summary_has_every_mean_as_benchmarks_write_theirs(evaluated):
    objects = [json.loads(line) for line in (evaluated / "summary.jsonl").read_text().splitlines()]
    assert set(objects[0]) == {
        *(f.name for f in fields(Measurement)),
        "bench",
        "gpu",
        "torch",
        "triton",
        "commit",
        "time",
    }
    named = {(each["case"], each["contender"]): each for each in objects}
    assert len(named) == len(objects) == 2 * 2 * len(CONTENDERS)
    summaries = aggregate(read(evaluated)[1])
    (score,) = [s.scores["kl"] for s in summaries if (s.policy, s.memory_size, s.task) == ("random", 32, "text")]
    own = named["model text T=240 M=32 rows=3", "random"]
    assert (own["value"], own["spread"], own["limit"]) == (score.mean, score.standard_error, 0)


def test_the_bytes_are_those_of_the_caches(evaluated, files):
    lines = map(json.loads, (evaluated / "results.jsonl").open())
    sizes = {(line["policy"], line["memory_size"]): line["bytes"] for line in lines if line["kind"] == "memory"}
    assert sizes["full", None] == 2 * 4 * 2 * 240 * 8 * 4  # keys and values, layers, heads, tokens, dims, fp32
    small, large = sizes["random", 8], sizes["random", 32]
    slot_bytes = 2 * 8 * 4
    assert 24 * 8 * slot_bytes < large - small < 24 * 8 * slot_bytes * 2, "24 more slots in each of 8 heads"
    assert small < large < sizes["full", None]


def test_the_picture_shows_something(evaluated):
    from matplotlib.image import imread

    picture = imread(evaluated / "score.png")
    assert picture.shape[0] > 300 and picture.shape[1] > 900
    assert len({tuple(pixel) for pixel in picture[::3, ::3, :3].reshape(-1, 3).round(1)}) > 20


def test_once_more_into_the_same_folder(evaluated, files):
    before = read(evaluated)[1]
    arguments = ["--policies", "random", "--budgets", "uniform", "--seed", "1"]
    assert main(["evaluate", *files.arguments, *OPTIONS, *arguments, "--output", str(evaluated)]) == 0
    header, records = read(evaluated)
    assert {r["policy"] for r in records} == {"full", "random"} != {r["policy"] for r in before}
    report = (evaluated / "report.md").read_text()
    assert "streaming_llm" not in report and header["seeds"] == [1]
    assert sorted(path.name for path in evaluated.iterdir()) == [
        ".retention-gates", "report.html", "report.md", "results.jsonl", "score.png", "scores.jsonl",
        "summary.jsonl",
    ]  # fmt: skip


def test_untrained_gates_run_the_policies_that_need_none(files, tmp_path):
    arguments = ["--model", str(files.model), "--text", str(files.texts), "--length", "50", "--memory-size", "16"]
    assert main(["evaluate", *arguments, "--batch-size", "8", "--output", str(tmp_path / "out")]) == 0
    _, records = read(tmp_path / "out")
    assert model_facts(tmp_path / "out")["adapter"] is None
    assert {r["policy"] for r in records} == {"full", *(name for name in POLICIES if can_run(name, None))}
    assert "retention" not in {r["policy"] for r in records} > set(RIVALS)
    assert {r["budgets"] for r in records} == {"uniform", None}


ROTATING = ("expected_attention", "triattention")  # queries


def test_policies_that_a_model_cannot_have(files, tmp_path, monkeypatch, capsys):
    """Of all that there are they are left out, which is said; by name they are refused."""

    def refuse(model, policy):
        raise ValueError(f"no {policy} here")

    for place in ("gates.cache.rotary_frequencies", "gates.cache.evicting_cache", "recipes.comparison.run"):
        monkeypatch.setattr(f"retention_gates.{place}.rotary_frequencies", refuse)
    arguments = ["--model", str(files.model), "--text", str(files.texts), "--length", "40", "--memory-size", "16"]
    arguments += ["--documents", "1", "--output", str(tmp_path / "out")]
    assert main(["evaluate", *arguments, "--policies", "tova", "expected_attention"]) == 2
    assert "no expected_attention here" in capsys.readouterr().err
    assert main(["evaluate", *arguments]) == 0
    assert "without expected_attention: no expected_attention here" in capsys.readouterr().out
    assert {r["policy"] for r in read(tmp_path / "out")[1]} == {
        *("full", *(name for name in POLICIES if can_run(name, None) and name not in ROTATING))
    }
    assert "; without expected_attention, triattention, which" in (tmp_path / "out" / "report.md").read_text()


def test_gemma_has_two_rotary_embeddings():
    assert tuple(_unfit(["tova", *ROTATING], gated_model("gemma3_text"))) == ROTATING
    assert _unfit(["tova", *ROTATING], gated_model("llama")) == {}


def test_a_folder_of_folders_of_ours_is_ours(evaluated, files, tmp_path):
    inner = tmp_path / "run" / "inner"
    assert main(["calibrate", *files.arguments, "--length", "96", "--rows", "1", "--output", str(inner)]) == 0
    arguments = [*files.arguments, *OPTIONS, "--policies", "random", "--output", str(tmp_path / "run")]
    assert main(["evaluate", *arguments, "--budgets", "uniform"]) == 0
    assert (tmp_path / "run" / "report.md").exists() and (inner / "adapter_config.json").exists()


def results_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != "scores.jsonl"}


def test_a_full_disk_leaves_the_old_results(evaluated, files, monkeypatch, capsys):
    before = results_of(evaluated)

    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    assert main(["evaluate", *files.arguments, *OPTIONS, "--policies", "random", "--output", str(evaluated)]) == 2
    assert "No space left on device" in capsys.readouterr().err
    assert results_of(evaluated) == before


def test_results_outlive_a_picture_that_cannot_be_drawn(files, tmp_path, monkeypatch, capsys):
    def broken(summaries, path):
        raise ValueError("no picture today")

    monkeypatch.setattr("retention_gates.recipes.report.plots.score_against_memory", broken)
    arguments = [*files.arguments, *OPTIONS, "--policies", "random", "--budgets", "uniform"]
    assert main(["evaluate", *arguments, "--output", str(tmp_path / "out")]) == 2
    assert "no picture today" in capsys.readouterr().err
    _, records = read(tmp_path / "out")
    assert records and not (tmp_path / "out" / "score.png").exists()


def test_rivals_with_measured_budgets(files, tmp_path, capsys):
    """They are measured on the works that are not scored, and a run without such works is refused."""
    arguments = ["evaluate", "--model", str(files.model), "--text", str(files.texts), "--length", "60"]
    arguments += ["--memory-size", "16", "--policies", "snapkv", "tova", "--budgets", "uniform", "measured"]
    arguments += ["--documents", "2", "--output", str(tmp_path / "out")]
    assert main(arguments) == 2
    assert "Measured budgets need works that are not scored" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    assert main([*arguments, "--test-works", "work3"]) == 0
    records = [r for r in read(tmp_path / "out")[1] if r["policy"] != "full"]
    names = {(r["policy"], r["budgets"]) for r in records}
    assert names == {(policy, budgets) for policy in ("snapkv", "tova") for budgets in ("uniform", "measured")}
    scores = {name: [r["kl"] for r in records if (r["policy"], r["budgets"]) == name] for name in names}
    assert scores["snapkv", "uniform"] != scores["snapkv", "measured"]
    report = (tmp_path / "out" / "report.md").read_text()
    assert "SnapKV, measured" in report or "| measured |" in report
