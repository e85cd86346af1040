"""The demo's steps, without running them, and what `make demo` passes on."""

import subprocess
from pathlib import Path

import pytest

from retention_gates.recipes import demo

ROOT = Path(__file__).resolve().parents[2]
OPTIONS = ("--model", "--adapter", "--text", "--split-seed", "--documents", "--length", "--memory-size", "--output")


def not_there(base_model):
    raise ValueError(f"No gates for {base_model!r}.")


@pytest.mark.parametrize(
    "arguments, output",
    [
        (["--model", "someone/Model-1B"], "out/demo-Model-1B"),
        (["--model", "folder/of/model/"], "out/demo-model"),
        (["--model", "someone/Model-1B", "--output", "elsewhere"], "elsewhere"),
        ([], "out/demo"),
    ],
)
def test_each_model_has_an_output_folder_of_its_own(arguments, output, tmp_path, monkeypatch):
    commands = []
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(demo, "find_model", lambda wanted: {"model": wanted or demo.HUB_MODEL})
    monkeypatch.setattr(demo, "run", lambda title, *command: commands.append(command))
    monkeypatch.setattr("sys.argv", ["demo", *arguments])
    monkeypatch.setattr(demo, "shipped_adapter", not_there)
    demo.main()
    train, generate, evaluate, *beside, inspect = commands
    assert beside == []
    assert f"training.output_dir={output}" in train
    assert generate[generate.index("--adapter") + 1] == f"{output}/adapter"
    assert evaluate[evaluate.index("--output") + 1] == output
    assert inspect[inspect.index("--output") + 1] == f"{output}/inspect"


def test_the_shipped_gates_are_scored_on_the_same_passages(tmp_path, monkeypatch, capsys):
    commands = []
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(demo, "find_model", lambda wanted: {"model": demo.HUB_MODEL})
    monkeypatch.setattr(demo, "run", lambda title, *command: commands.append(command))
    monkeypatch.setattr(demo, "shipped_adapter", lambda base_model: Path("shipped") / base_model.rpartition("/")[2])
    monkeypatch.setattr("sys.argv", ["demo"])
    demo.main()
    evaluations = [command for command in commands if command[0] == "evaluate"]
    trained, shipped = ({name: command[command.index(name) + 1] for name in OPTIONS} for command in evaluations)
    assert shipped == trained | {"--adapter": "shipped/SmolLM2-135M-Instruct", "--output": "out/demo/shipped"}
    assert "Nothing is shown" not in capsys.readouterr().out

    monkeypatch.setattr(demo, "shipped_adapter", not_there)
    demo.main()
    assert sum(command[0] == "evaluate" for command in commands) == 3
    assert f"just trained. No gates for {demo.HUB_MODEL!r}" in capsys.readouterr().out


def test_make_passes_model_and_output_on():
    command = ["make", "--dry-run", "demo", "MODEL=someone/model", "OUTPUT=some where"]
    printed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert 'recipes/demo.py --model "someone/model" --output "some where"' in printed
