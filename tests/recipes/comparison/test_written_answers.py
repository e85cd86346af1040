"""retention-gates evaluate --suites: answers of a local suite, its two files, and what is refused."""

import json
from pathlib import Path

import pytest
import torch
from tiny_adapter import Files, make_files

from retention_gates.cli import main
from retention_gates.data.suites import SUITES
from retention_gates.data.suites.base import Suite
from retention_gates.recipes.comparison.answer_store import AnswerStore
from retention_gates.trainers.evaluation.answer_rows import AnswerRows

FIXTURES = Path(__file__).parent.parent.parent / "fixtures" / "suites"


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> Files:
    return make_files(tmp_path_factory.mktemp("suites"))


@pytest.fixture
def local_suites(monkeypatch):
    """The Hub's data sets are read from the records in their form."""

    def local(self: Suite, subset: str):
        return self._local(str(FIXTURES / f"{self.name}__{subset}.jsonl"), subset)

    monkeypatch.setattr(Suite, "_hub", local)


def test_answers_are_written_and_scored(files, local_suites, tmp_path):
    arguments = ["evaluate", *files.arguments, "--suites", "gsm8k", "ruler/4096", "--memory-size", "8", "16"]
    arguments += ["--policies", "retention", "streaming_llm", "--max-new-tokens", "4", "--longest-prompt", "20"]
    assert main([*arguments, "--output", str(tmp_path / "out")]) == 0
    header, *records = map(json.loads, (tmp_path / "out" / "results.jsonl").read_text().splitlines())
    assert header["suites"] == ["gsm8k", "ruler/4096"] and header["tokens_left_out"] > 0
    assert len(records) == 5 * (1 + 2 * 2) and all(0 <= record["score"] <= 1 for record in records)
    tasks = {record["task"] for record in records}
    assert tasks == {"gsm8k", "ruler/niah_multivalue", "ruler/vt", "ruler/qa_1"}
    assert all(record["new_tokens"] <= 4 and isinstance(record["answer"], str) for record in records)
    lines = (tmp_path / "out" / "report.md").read_text().splitlines()
    table = [line for line in lines if line.startswith("| gsm8k |")]
    assert len(table) == 5 and all(line.count("|") == 9 for line in table)
    assert table[0].startswith("| gsm8k | all | full |  | 0.000 ± 0.000 | 2 |")
    assert "| 0 / 0 | 1 |" in table[1], "neither policy answers anything right"
    page = (tmp_path / "out" / "report.html").read_text()
    assert page.startswith("<!doctype html>") and "<h3>ruler/qa_1</h3>" in page and "<svg" in page
    assert "gsm8k: the full cache scores 0.000 ± 0.000 on 2 questions" in page


def test_a_local_copy_is_read_by_its_name(files, tmp_path):
    copy = f"aime24={FIXTURES / 'aime24__default.jsonl'}"
    arguments = ["evaluate", *files.arguments, "--suites", copy, "--memory-size", "8", "--policies", "retention"]
    assert main([*arguments, "--max-new-tokens", "2", "--limit", "1", "--output", str(tmp_path / "out")]) == 0
    _, *records = map(json.loads, (tmp_path / "out" / "results.jsonl").read_text().splitlines())
    assert [(r["task"], r["policy"]) for r in records] == [("aime24", "full"), ("aime24", "retention")]


def test_a_batch_that_is_too_large_keeps_what_was_answered(files, tmp_path, monkeypatch, capsys):
    copy = f"aime24={FIXTURES / 'aime24__default.jsonl'}"
    arguments = ["evaluate", *files.arguments, "--suites", copy, "--memory-size", "8", "--policies", "retention"]
    arguments += ["--max-new-tokens", "2", "--batch-size", "7", "--output", str(tmp_path / "out")]
    taken, place = [], AnswerRows.place

    def too_large(self, rows, jobs, logits):
        if taken:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        taken.append(rows)
        place(self, rows, jobs, logits)

    with monkeypatch.context() as patch:
        patch.setattr(AnswerRows, "place", too_large)
        assert main(arguments) == 2
    assert "--batch-size 7 needs more memory than the device has (CUDA out of memory." in capsys.readouterr().err
    assert main(arguments) == 0
    assert "2 of 4 answers were there already" in capsys.readouterr().out


def test_a_run_that_was_stopped_goes_on_and_a_second_one_writes_nothing_anew(files, tmp_path, monkeypatch, capsys):
    copy = f"aime24={FIXTURES / 'aime24__default.jsonl'}"
    arguments = ["evaluate", *files.arguments, "--suites", copy, "--memory-size", "8", "--policies", "retention"]
    arguments += [
        "--max-new-tokens",
        "5",
        "--samples",
        "4",
        "--temperature",
        "0.9",
        "--batch-size",
        "3",
        "--seed",
        "2",
    ]

    def results(name):
        _, *records = map(json.loads, (tmp_path / name / "results.jsonl").read_text().splitlines())
        return records

    assert main([*arguments, "--output", str(tmp_path / "whole")]) == 0
    whole = results("whole")
    assert len(whole) == 2 * 2 * 4 and [r["sample"] for r in whole[:4]] == [0, 1, 2, 3]
    assert len({r["answer"] for r in whole}) > 4

    taken, add = [], AnswerStore.add

    def stops(self, ask, record):
        if len(taken) == 5:
            raise KeyboardInterrupt
        taken.append(ask)
        add(self, ask, record)

    with monkeypatch.context() as patch:
        patch.setattr(AnswerStore, "add", stops)
        assert main([*arguments, "--output", str(tmp_path / "stopped")]) == 130
    with (tmp_path / "stopped" / "answers.jsonl").open("a") as file:
        file.write('{"unit": {"tas')  # as a killed process leaves it
    capsys.readouterr()
    assert main([*arguments, "--output", str(tmp_path / "stopped")]) == 0
    assert "5 of 16 answers were there already; 11 were written." in capsys.readouterr().out
    assert results("stopped") == whole

    assert main([*arguments, "--output", str(tmp_path / "stopped")]) == 0
    assert "16 of 16 answers were there already; 0 were written." in capsys.readouterr().out
    assert results("stopped") == whole
    assert main([*arguments[:-1], "3", "--output", str(tmp_path / "stopped")]) == 0
    assert "there already" not in capsys.readouterr().out, "another seed draws other answers"
    lines = [json.loads(line) for line in (tmp_path / "whole" / "summary.jsonl").read_text().splitlines()]
    means = [line for line in lines if line["bench"] == "written_answers"]
    assert [line["contender"] for line in means] == ["full", "retention/uniform"]
    assert means[1]["case"].endswith("M=8 n=2 T=0.9 samples=4") and means[1]["limit"] == means[0]["value"]
    seconds = [line for line in lines if line["bench"] == "answer_seconds"]
    assert len(seconds) == 2 and all(line["value"] > 0 and "n=8 batch=3" in line["case"] for line in seconds)
    report = (tmp_path / "whole" / "report.md").read_text()
    assert "answers: mean of 4 to each question, drawn at temperature 0.9; 3 at a time; seed 2" in report


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--suites", "gms8k"], "unknown suite 'gms8k'"),
        (["--suites", "gsm8k=nowhere.jsonl"], "there is no file or folder 'nowhere.jsonl'"),
        (["--suites", "gsm8k", "--tasks", "passkey"], "--tasks is scored without writing answers"),
        (["--suites", "gsm8k", "--limit", "0"], "--limit 0 must be 1 or more"),
        (["--suites", "gsm8k", "--samples", "4"], "--samples 4 --temperature 0: samples=4 of the likeliest tokens"),
        (["--suites", "gsm8k", "--samples", "0"], "samples=0 must be 1 or more"),
        (["--suites", "gsm8k", "--temperature", "nan"], "temperature=nan must be 0"),
        (["--suites", "gsm8k", "--batch-size", "0"], "--batch-size 0 must be 1 or more"),
        (["--suites", "gsm8k", "--memory-size", "0"], "--memory-size 0 must be 1 or more"),
        (["--suites", "gsm8k", "--policies", "snap"], "snap"),
        (["--suites", "gsm8k", "--longest-prompt", "510"], "the model has 512 positions: shorten prompts"),
    ],
)
def test_mistakes_are_named(files, local_suites, tmp_path, capsys, arguments, message):
    assert main(["evaluate", *files.arguments, *arguments, "--output", str(tmp_path / "out")]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_suites_are_those_that_are_documented():
    assert sorted(SUITES) == [
        "aime24", "gsm8k", "infinitebench", "kv_retrieval", "longbench", "longbench_v2", "longmemeval", "longproc",
        "math500", "ruler", "scbench",
    ]  # fmt: skip


def test_what_is_not_installed_is_named(files, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("retention_gates.recipes.comparison.lm_eval_model.INSTALLED", False)
    monkeypatch.setattr("retention_gates.recipes.kvpress_press.INSTALLED", False)
    assert main(["evaluate", *files.arguments, "--lm-eval", "gsm8k", "--output", str(tmp_path / "out")]) == 2
    assert "lm-eval's tasks need its package: pip install" in capsys.readouterr().err
    from retention_gates.recipes.kvpress_press import RetentionPress

    with pytest.raises(ValueError, match="needs the package kvpress: pip install kvpress"):
        RetentionPress(adapter=str(files.adapter))


def test_rivals_with_measured_budgets(files, tmp_path, capsys):
    copy = f"aime24={FIXTURES / 'aime24__default.jsonl'}"
    arguments = ["evaluate", "--model", str(files.model), "--suites", copy, "--memory-size", "16", "--limit", "1"]
    arguments += ["--policies", "snapkv", "--max-new-tokens", "3", "--output", str(tmp_path / "out")]
    for more in (["--budgets", "measured"], ["--calibrate-on", str(files.texts)]):
        assert main([*arguments, *more]) == 2
        assert "--budgets measured and --calibrate-on SOURCE go together" in capsys.readouterr().err
    short = tmp_path / "short.txt"
    short.write_text("the old ship")
    assert main([*arguments, "--budgets", "measured", "--calibrate-on", str(short)]) == 2
    assert "short.txt has 4 tokens, where 8 rows of 1024 are wanted" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_measured_budgets_are_told_in_the_table(files, tmp_path, monkeypatch):
    monkeypatch.setattr("retention_gates.recipes.comparison.written_answers.CALIBRATION_LENGTH", 100)
    copy = f"aime24={FIXTURES / 'aime24__default.jsonl'}"
    arguments = ["evaluate", "--model", str(files.model), "--suites", copy, "--memory-size", "16", "--limit", "1"]
    arguments += ["--policies", "snapkv", "--max-new-tokens", "3", "--output", str(tmp_path / "out")]
    assert main([*arguments, "--budgets", "uniform", "measured", "--calibrate-on", str(files.texts)]) == 0
    header, *records = map(json.loads, (tmp_path / "out" / "results.jsonl").read_text().splitlines())
    assert header["calibrate_on"] == str(files.texts)
    assert [r["budgets"] for r in records] == [None, "uniform", "measured"]
    assert "| snapkv | measured |" in (tmp_path / "out" / "report.md").read_text()


def test_samples_that_no_machine_has_room_for(files, local_suites, tmp_path, capsys):
    arguments = ["evaluate", *files.arguments, "--suites", "gsm8k", "--memory-size", "16", "--policies", "random"]
    drawn = ["--samples", str(10**12), "--temperature", "1", "--max-new-tokens", "4", "--longest-prompt", "40"]
    assert main([*arguments, *drawn, "--output", str(tmp_path / "out")]) == 2
    assert f"samples={10**12} takes " in capsys.readouterr().err
