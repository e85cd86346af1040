"""The sdist and the wheel hold real files where the repository has symlinks, and everything in the wheel imports."""

import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
FOLDERS = ("gates", "trainers", "data", "kernels", "recipes", "checkpoints")
SUFFIXES = {".py", ".yaml", ".json", ".md", ".safetensors"}
LEFT_BEHIND = shutil.ignore_patterns(".*", "__pycache__", "*.egg-info", "build", "dist", "out", "tests")


@pytest.fixture(scope="module")
def distributions(tmp_path_factory) -> Path:
    """Builds in a copy of the working tree: the sdist first, then the wheel from the sdist."""
    folder = tmp_path_factory.mktemp("distributions")
    shutil.copytree(ROOT, folder / "copy", symlinks=True, ignore=LEFT_BEHIND)
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(folder), str(folder / "copy")]
    result = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
    return folder


def only(folder: Path, pattern: str) -> Path:
    (found,) = folder.glob(pattern)
    return found


def packaged_files() -> set[str]:
    """Gives what has to be in the wheel: every module and every file that a module or a user reads beside it."""
    files = {"cli.py", "compat.py", "process.py", "registration.py", "__init__.py", "__main__.py", "py.typed"}
    for folder in FOLDERS:
        found = (file for file in (ROOT / folder).rglob("*") if file.suffix in SUFFIXES)
        files |= {str(file.relative_to(ROOT)) for file in found if "__pycache__" not in file.parts}
    return {f"retention_gates/{file}" for file in files}


def test_sdist_holds_real_files(distributions):
    with tarfile.open(only(distributions, "*.tar.gz")) as sdist:
        members = {member.name.partition("/")[2]: member for member in sdist.getmembers()}
    assert not [name for name, member in members.items() if member.issym() or member.islnk()]
    assert {f"src/{file}" for file in packaged_files()} <= members.keys()
    assert "LICENSE" in members


def test_wheel_holds_every_file_once(distributions):
    with zipfile.ZipFile(only(distributions, "*.whl")) as wheel:
        names = wheel.namelist()
    assert len(names) == len(set(names))
    assert {name for name in names if ".dist-info/" not in name} == packaged_files()


@pytest.mark.slow  # imports everything once more, 11 s; the files are compared above
def test_every_module_of_the_wheel_imports(distributions, tmp_path):
    with zipfile.ZipFile(only(distributions, "*.whl")) as wheel:
        wheel.extractall(tmp_path)
    result = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("import_all.py"))],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(tmp_path)},  # before the editable install
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    assert f"modules imported from {tmp_path / 'retention_gates'}" in result.stdout
