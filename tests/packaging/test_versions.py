"""What pyproject.toml promises, what is pinned and what the package says of installed versions belong together."""

import os
import subprocess
import sys
import tomllib
import warnings
from importlib.metadata import PackageNotFoundError
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

from retention_gates import compat, process

ROOT = Path(__file__).resolve().parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
RANGES = {canonicalize_name(each.name): each.specifier for each in map(Requirement, PROJECT["dependencies"])}
IN_RANGE = {"torch": "2.13.0+cpu", "transformers": "5.17.0", "peft": "0.21.2"}


def lines(file: str) -> dict[str, str]:
    """Returns the pins of a file, name by name as written."""
    text = (ROOT / file).read_text()
    return dict(line.split("==") for line in text.splitlines() if not line.startswith("#"))


def pins(file: str) -> dict[str, Version]:
    return {canonicalize_name(name): Version(version) for name, version in lines(file).items()}


NEWEST, OLDEST = pins("constraints.txt"), pins(".ci/oldest.txt")


def test_the_package_names_what_pyproject_promises():
    for name in compat.TESTED:
        assert Requirement(compat.requirement(name)).specifier == RANGES[name]


def test_both_ends_of_each_range_are_pinned():
    for name, (_, newest) in compat.TESTED.items():
        assert NEWEST[name].release[:2] == Version(newest).release, f"{name} in constraints.txt is not the newest"
    for name, specifier in RANGES.items():
        assert NEWEST[name] in specifier
        if name != "torch":  # make test-gpu tests the oldest
            (lowest,) = [Version(each.version) for each in specifier if each.operator == ">="]
            assert OLDEST[name].release[: len(lowest.release)] == lowest.release, f"{name} in .ci/oldest.txt"


def test_a_pin_of_the_oldest_replaces_one_in_the_constraints():
    """.ci/run compares the names as they are written, but for case."""
    spelled = {canonicalize_name(name): name.lower() for name in lines("constraints.txt")}
    for name in lines(".ci/oldest.txt"):
        assert spelled[canonicalize_name(name)] == name.lower()


def check(monkeypatch, **versions: str) -> list[str]:
    """Returns the warnings of `check_versions` where these versions are installed."""
    monkeypatch.setattr(compat, "version", lambda name: (IN_RANGE | versions)[name])
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        compat.check_versions()
    return [str(each.message) for each in caught]


@pytest.mark.parametrize(
    "versions",
    [{}, {"torch": "2.11.0+cu130"}, {"torch": "2.12.0.post1"}, {"transformers": "5.24.3"}, {"peft": "0.21.0"}],
)
def test_tested_releases_are_no_news(monkeypatch, versions):
    assert check(monkeypatch, **versions) == []


@pytest.mark.parametrize(
    ("name", "installed"),
    [
        ("transformers", "5.25.0"),
        ("transformers", "6.0"),
        ("transformers", "5.25.0.dev0"),  # of the main branch
        ("transformers", "5.24.0.dev0"),  # the main branch before that release
        ("transformers", "5.24.1rc1"),
        ("torch", "2.14.1"),
        ("torch", "2.11.0a0+ebedce4.nv26.1"),  # of a container
        ("peft", "0.22.0"),
    ],
)
def test_newer_and_unreleased_versions_are_a_warning(monkeypatch, name, installed):
    (message,) = check(monkeypatch, **{name: installed})
    assert message.startswith(f"retention-gates was not tested with {name} {installed} (releases of ")
    assert message.endswith(f"pip install '{compat.requirement(name)}'")


def test_one_warning_names_all(monkeypatch):
    (message,) = check(monkeypatch, torch="2.14.0", transformers="5.30.1")
    assert "torch 2.14.0 (releases of 2.11 to 2.13 are tested), transformers 5.30.1 (releases of 5.17 " in message


@pytest.mark.parametrize(
    ("name", "installed"),
    [("transformers", "5.16.1"), ("transformers", "4.57.1"), ("peft", "0.20.0"), ("torch", "2.6.0")],
)
def test_older_versions_are_an_error(monkeypatch, name, installed):
    with pytest.raises(ValueError) as error:
        check(monkeypatch, **{name: installed, "transformers": installed if name == "transformers" else "5.99.0"})
    assert f"does not run with {name} {installed} (releases of " in str(error.value)
    assert str(error.value).endswith(f"are tested). Install tested releases: pip install '{compat.requirement(name)}'")


def test_what_is_not_installed_is_named_with_the_python_that_lacks_it(monkeypatch):
    def version(name: str) -> str:
        if name != "transformers":
            raise PackageNotFoundError(name)
        return "5.17.0"

    monkeypatch.setattr(compat, "version", version)
    with pytest.raises(ModuleNotFoundError) as error:
        compat.check_versions()
    assert str(error.value).startswith(
        f"{sys.executable} has no torch, peft. Install tested releases: pip install 'tor"
    )


# Python runs this before the program: a package has another version, and at the end it says whether torch was imported
OTHER_VERSION = """
import atexit, importlib.metadata, sys
real = importlib.metadata.version
importlib.metadata.version = lambda name: {installed!r} if name == {package!r} else real(name)
atexit.register(lambda: print("torch" in sys.modules))
"""
COMMAND = str(Path(sys.executable).parent / "retention-gates")


@pytest.fixture
def run(tmp_path: Path):
    """Gives a function that runs a program with which a package has this version."""

    def run(package: str, installed: str, *program: str) -> subprocess.CompletedProcess[str]:
        (tmp_path / "sitecustomize.py").write_text(OTHER_VERSION.format(package=package, installed=installed))
        path = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])
        return subprocess.run(
            program, capture_output=True, text=True, timeout=240, cwd=tmp_path, env=os.environ | {"PYTHONPATH": path}
        )

    return run


COMMANDS = {
    "the command": (COMMAND, "--version"),
    "a module": (sys.executable, "-m", "retention_gates", "--version"),
    "a module and an option": (sys.executable, "-Pm", "retention_gates", "--version"),
    "a module of recipes": (sys.executable, "-m", "retention_gates.recipes.train"),
}


@pytest.mark.parametrize("way", COMMANDS)
def test_an_old_version_stops_the_command_before_all_else_with_one_line(run, way):
    result = run("transformers", "5.16.1", *COMMANDS[way])
    assert result.returncode == 2 and result.stdout.strip() == "False"
    (line,) = result.stderr.splitlines()
    assert line.startswith(
        "retention-gates: error: retention-gates does not run with transformers 5.16.1 (releases of"
    )
    assert line.endswith(f"pip install '{compat.requirement('transformers')}'")


@pytest.mark.parametrize(
    "program", [("-c", "import retention_gates"), ("-m", "other"), ("other.py", "retention_gates")]
)
def test_an_old_version_is_an_error_in_another_program(run, tmp_path, program):
    (tmp_path / "other.py").write_text("import retention_gates.cli")
    result = run("transformers", "5.16.1", sys.executable, *program)
    assert result.returncode == 1 and result.stdout.strip() == "False"
    assert result.stderr.splitlines()[-1].startswith("ValueError: retention-gates does not run with transformers")


def test_files_of_recipes_are_the_command_too(monkeypatch, tmp_path):
    for started, expected in {
        ROOT / "recipes" / "train.py": True,
        ROOT / "recipes" / "bench" / "decode.py": True,
        ROOT / "tests" / "packaging" / "test_versions.py": False,
        ROOT / "recipes" / "-c": False,
        tmp_path / "retention-gates.exe": True,
    }.items():
        monkeypatch.setattr(sys, "argv", [str(started)])
        assert process.is_command() == expected, started
    monkeypatch.setattr(sys, "argv", [])
    assert not process.is_command()


@pytest.mark.slow  # imports torch and transformers once more, 8 s
def test_a_command_warns_once(run):
    result = run("transformers", "5.99.0", COMMAND, "--version")
    assert result.returncode == 0 and "retention-gates 0" in result.stdout
    assert result.stderr.count("not tested with transformers 5.99.0") == 1
