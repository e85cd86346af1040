"""retention-gates evaluate: its three files and what stands in them."""

import json
from pathlib import Path

import pytest
from tiny_adapter import Files, make_files

from retention_gates.cli import main
from retention_gates.trainers.comparison import aggregate
from retention_gates.trainers.evaluation import contenders

OPTIONS = ["--documents", "3", "--length", "240", "--memory-size", "8", "32", "--examples", "2"]


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> Files:
    files = make_files(tmp_path_factory.mktemp("evaluate"))
    assert main(["calibrate", *files.arguments, "--length", "96", "--rows", "2"]) == 0
    return files


@pytest.fixture(scope="module")
def evaluated(files, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("out") / "evaluation"
    arguments = [*files.arguments, *OPTIONS, "--tasks", "passage_repeat", "--test-works", "work1", "work3"]
    assert main(["evaluate", *arguments, "--output", str(folder)]) == 0
    return folder


def read(folder: Path) -> tuple[dict, list[dict]]:
    header, *records = [json.loads(line) for line in (folder / "results.jsonl").read_text().splitlines()]
    assert header.pop("kind") == "header" and {record.pop("kind") for record in records} == {"record"}
    return header, records


def test_results_have_a_record_of_each_row_and_contender(evaluated, files):
    header, records = read(evaluated)
    assert header["adapter"] == str(files.adapter) and header["model"] == str(files.model)
    assert header["start"] == 32 and header["rows"] == 3 and header["held_out"] == "work1, work3"
    assert {"torch", "transformers", "peft", "retention_gates", "commit", "time", "seconds", "device"} <= set(header)
    chosen = contenders(["retention"], [8, 32], ["uniform", "calibrated"])
    chosen += contenders(["streaming_llm", "random", "key_norm"], [8, 32], ["uniform"])
    for task, rows in (("text", 3), ("passage_repeat", 2)):
        named = [(r["row"], r["policy"], r["memory_size"], r["budgets"]) for r in records if r["task"] == task]
        expected = {(row, c.policy, c.memory_size, c.budgets) for row in range(rows) for c in chosen}
        assert len(named) == len(set(named)) and set(named) == expected | {
            (r, "full", None, None) for r in range(rows)
        }
    assert all(r["kl"] > 1e-3 for r in records if r["task"] == "text" and r["policy"] != "full")


def test_the_report_says_what_the_records_say(evaluated):
    _, records = read(evaluated)
    lines = (evaluated / "report.md").read_text().splitlines()
    summaries = aggregate(records, reference="streaming_llm")
    (calibrated,) = [s for s in summaries if (s.task, s.memory_size, s.budgets) == ("text", 32, "calibrated")]
    (line,) = [line for line in lines if line.startswith("| 32 | retention | calibrated |") and "of 3" in line]
    cells = [cell.strip(" *") for cell in line.strip("|").split("|")]
    for metric, cell in zip(("kl", "perplexity_ratio", "agreement"), cells[3:6], strict=True):
        score = calibrated.scores[metric]
        assert cell == f"{score.mean:.3f} ± {score.standard_error:.3f}"
    pairing = calibrated.scores["kl"].pairing
    assert cells[6:] == [f"{pairing.wins} of 3", f"{pairing.p_value:.2g}"]
    assert any(line.startswith("| all | full |  | 0.000 ± 0.000 | 1.000 ± 0.000 |") for line in lines)
    assert [line for line in lines if line.startswith("## ")] == [
        "## Text",
        "## Task passage_repeat",
        "## How to read this",
    ]
    widths = {
        line.count("|") for line in lines[lines.index("## Text") : lines.index("## Task passage_repeat")] if line
    }
    assert widths == {0, 9}, "every line of the table has as many cells as its heading"


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
    assert "streaming_llm" not in report and header["seed"] == 1
    assert sorted(path.name for path in evaluated.iterdir()) == [
        ".retention-gates", "report.md", "results.jsonl", "score.png",
    ]  # fmt: skip


def test_untrained_gates_run_the_policies_that_need_none(files, tmp_path):
    arguments = ["--model", str(files.model), "--text", str(files.texts), *OPTIONS, "--batch-size", "2"]
    assert main(["evaluate", *arguments, "--output", str(tmp_path / "out")]) == 0
    header, records = read(tmp_path / "out")
    assert header["adapter"] is None
    assert {r["policy"] for r in records} == {"full", "streaming_llm", "random", "key_norm"}
    assert {r["budgets"] for r in records} == {"uniform", None}


def test_a_folder_of_folders_of_ours_is_ours(evaluated, files, tmp_path):
    inner = tmp_path / "run" / "inner"
    assert main(["calibrate", *files.arguments, "--length", "96", "--rows", "1", "--output", str(inner)]) == 0
    arguments = [*files.arguments, *OPTIONS, "--policies", "random", "--output", str(tmp_path / "run")]
    assert main(["evaluate", *arguments, "--budgets", "uniform"]) == 0
    assert (tmp_path / "run" / "report.md").exists() and (inner / "adapter_config.json").exists()


def test_a_full_disk_leaves_the_old_results(evaluated, files, monkeypatch, capsys):
    before = {path.name: path.read_bytes() for path in evaluated.iterdir()}

    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    assert main(["evaluate", *files.arguments, *OPTIONS, "--policies", "random", "--output", str(evaluated)]) == 2
    assert "No space left on device" in capsys.readouterr().err
    assert {path.name: path.read_bytes() for path in evaluated.iterdir()} == before


def test_results_outlive_a_picture_that_cannot_be_drawn(files, tmp_path, monkeypatch, capsys):
    def broken(summaries, path):
        raise ValueError("no picture today")

    monkeypatch.setattr("retention_gates.recipes.plots.score_against_memory", broken)
    arguments = [*files.arguments, *OPTIONS, "--policies", "random", "--budgets", "uniform"]
    assert main(["evaluate", *arguments, "--output", str(tmp_path / "out")]) == 2
    assert "no picture today" in capsys.readouterr().err
    _, records = read(tmp_path / "out")
    assert records and not (tmp_path / "out" / "score.png").exists()
