"""The demo's steps, without running them, and what `make demo` passes on."""

import subprocess
from pathlib import Path

import pytest

from retention_gates.recipes import demo

ROOT = Path(__file__).resolve().parents[2]


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
    demo.main()
    train, generate, evaluate, inspect = commands
    assert f"training.output_dir={output}" in train
    assert generate[generate.index("--adapter") + 1] == f"{output}/adapter"
    assert evaluate[evaluate.index("--output") + 1] == output
    assert inspect[inspect.index("--output") + 1] == f"{output}/inspect"


def test_make_passes_model_and_output_on():
    command = ["make", "--dry-run", "demo", "MODEL=someone/model", "OUTPUT=some where"]
    printed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert 'recipes/demo.py --model "someone/model" --output "some where"' in printed
