"""retention-gates evaluate: tasks with settings, with parts, and with a system prompt to pin."""

import json

import pytest
from tiny_adapter import Files, make_files

from retention_gates.cli import main


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> Files:
    return make_files(tmp_path_factory.mktemp("tasks"))


def test_parts_and_pinned_policies_have_records_and_lines(files, tmp_path, monkeypatch):
    monkeypatch.setattr(
        "retention_gates.recipes.report.html_page.page", lambda header, models: ""
    )  # seconds of pictures
    arguments = ["evaluate", *files.arguments, "--documents", "2", "--length", "400", "--memory-size", "160"]
    arguments += ["--tasks", "pitfalls:defence=first", "multi_turn:turns=2", "--pin", "--examples", "2"]
    arguments += ["--policies", "retention", "streaming_llm", "--output", str(tmp_path / "out")]
    assert main(arguments) == 0
    lines = map(json.loads, (tmp_path / "out" / "results.jsonl").read_text().splitlines())
    policies = {}
    for record in (line for line in lines if line["kind"] == "record"):
        policies.setdefault(record["task"], set()).add(record["policy"])
    plain, pinned = {"full", "retention", "streaming_llm"}, {"retention+pin", "streaming_llm+pin"}
    parts = ("greeting", "name", "number", "motto", "defence", "secret", "kept secret")
    tasks = {"pitfalls:defence=first", *(f"pitfalls:defence=first/{part}" for part in parts)}
    assert {task for task, found in policies.items() if found == plain | pinned} == tasks
    turns = {"multi_turn:turns=2", "multi_turn:turns=2/turn 1", "multi_turn:turns=2/turn 2"}
    assert {task for task, found in policies.items() if found == plain} == {"text", *turns}
    report = (tmp_path / "out" / "report.md").read_text()
    assert "turns=2/turn 2" in report and "| streaming_llm+pin |" in report


def test_a_system_prompt_that_no_memory_holds_is_named(files, tmp_path, capsys):
    arguments = ["evaluate", *files.arguments, "--documents", "2", "--length", "400", "--memory-size", "16"]
    arguments += ["--tasks", "pitfalls", "--pin", "--examples", "1", "--policies", "streaming_llm"]
    assert main([*arguments, "--output", str(tmp_path / "out")]) == 2
    assert "memory_size=16 must be at least" in capsys.readouterr().err
