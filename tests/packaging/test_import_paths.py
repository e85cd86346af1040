"""The root folders reach Python as parts of `retention_gates` only, however a process is started."""

import importlib.metadata
import importlib.util
import json
import os
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SCRIPTS = Path(sysconfig.get_path("scripts"))
FOLDERS = ("gates", "trainers", "data", "kernels", "recipes", "checkpoints")

# Python runs a `sitecustomize` it finds on its path before the program. This one notes what the program could have
# imported by the time it ends, without the program's help.
PROBE = f"""
import atexit, importlib.util, json, os, sys

def note():
    found = {{}}
    for name in {FOLDERS!r}:
        spec = importlib.util.find_spec(name)
        if spec is not None:
            found[name] = [spec.origin, *(spec.submodule_search_locations or [])]
    with open(os.path.join(os.environ["PROBE_FOLDER"], f"{{os.getpid()}}.json"), "w") as file:
        json.dump({{"argv": sys.argv, "found": found}}, file)

atexit.register(note)
"""


def ours(locations: list[str | None]) -> bool:
    """Says whether one of the locations lies in a root folder, symlinks resolved; `.venv` in the root is not ours."""
    resolved = [Path(location).resolve() for location in locations if location]
    return any(location.is_relative_to(ROOT / folder) for location in resolved for folder in FOLDERS)


def run(command: list[str | Path], **environment: str) -> subprocess.CompletedProcess[str]:
    """Runs a command in the repository root as a user would, without the protection that conftest.py gives."""
    inherited = {name: value for name, value in os.environ.items() if name not in ("PYTHONSAFEPATH", "PYTHONPATH")}
    return subprocess.run(
        [str(part) for part in command],
        cwd=ROOT,
        env=inherited | environment,
        capture_output=True,
        text=True,
        timeout=240,
    )


@pytest.fixture
def probed(tmp_path: Path):
    """Gives a function that runs a command and returns what each Python process of it noted on its way out."""

    def probe(command: list[str | Path]) -> list[dict]:
        (tmp_path / "sitecustomize.py").write_text(PROBE)
        result = run(command, PYTHONPATH=str(tmp_path), PROBE_FOLDER=str(tmp_path))
        assert result.returncode == 0, result.stderr[-3000:]
        return [json.loads(file.read_text()) for file in tmp_path.glob("*.json")]

    return probe


def bare_names_of_ours(notes: list[dict]) -> list[str]:
    return [name for note in notes for name, locations in note["found"].items() if ours(locations)]


def test_the_probe_sees_a_bare_name(probed):
    notes = probed([sys.executable, "-c", "pass"])  # `python -c` puts the current folder on the path
    assert set(bare_names_of_ours(notes)) == set(FOLDERS) - {"kernels"}
    assert "site-packages" in notes[0]["found"]["kernels"][0], "the installed kernels package should win over a folder"


def test_console_script(probed):
    notes = probed([SCRIPTS / "retention-gates", "--help"])
    assert len(notes) == 1
    assert bare_names_of_ours(notes) == []


@pytest.mark.slow  # two imports of torch and transformers, 12 s
def test_accelerate_launch(probed):
    notes = probed([SCRIPTS / "accelerate", "launch", "--cpu", "recipes/train.py", "--help"])
    assert any(note["argv"][0] == "recipes/train.py" for note in notes)
    assert bare_names_of_ours(notes) == []


def test_inside_pytest():
    for name in FOLDERS:
        spec = importlib.util.find_spec(name)
        assert spec is None or not ours([spec.origin, *(spec.submodule_search_locations or [])])


def test_inside_pytest_started_as_a_module():
    this_test = f"{Path(__file__).relative_to(ROOT)}::{test_inside_pytest.__name__}"
    result = run([sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", this_test])
    assert result.returncode == 0, result.stdout[-3000:]


def test_transformers_imports_with_the_root_on_the_path_and_kernels_installed():
    """DeepSpeed and `python -m` put the root on the path; transformers then asks for the `kernels` package.

    It does so only for some versions of it, so the one that is installed is passed off as the oldest of those.
    """
    assert importlib.metadata.version("kernels")
    program = """
import importlib.metadata, re, sys
real = importlib.metadata.version
wanted = re.search(r"kernels[^;]*>=([0-9.]+)", " ".join(importlib.metadata.requires("transformers")))[1]
importlib.metadata.version = lambda name: wanted if name == "kernels" else real(name)
import transformers.integrations.hub_kernels, kernels
from transformers import LlamaForCausalLM
assert transformers.utils.is_kernels_available(), (wanted, sys.path)
print(kernels.__file__)
"""
    result = run([sys.executable, "-c", program], PYTHONPATH=str(ROOT))
    assert result.returncode == 0, result.stderr[-3000:]
    assert not ours([result.stdout.strip()]) and "site-packages" in result.stdout


def test_no_recipe_hides_another_module():
    """`accelerate launch recipes/train.py` puts recipes/ before the standard library on the path."""
    installed = {name for name in importlib.metadata.packages_distributions() if name != "retention_gates"}
    names = {file.stem for file in (ROOT / "recipes").glob("*.py")} - {"__init__"}
    assert not names & (sys.stdlib_module_names | installed)
    below = {file.stem for file in (ROOT / "recipes").rglob("*.py")} - {"__init__"}
    assert not below & sys.stdlib_module_names
