"""A pass through rows that two ranks share gives what it gives on one: forecasts, log_beta and gradients."""

import json
import os
import sys
from pathlib import Path

import pytest
from tiny_run import run_quietly

SCRIPT = Path(__file__).parents[2] / "support" / "split_rows.py"
LAYOUTS = ("one document", "packed", "left padding", "right padding")
CASES = [f"{base}, {layout}" for base in ("llama-sdpa", "qwen3-eager") for layout in LAYOUTS]


@pytest.fixture(scope="module")
def differences(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, float]]:
    file = tmp_path_factory.mktemp("split") / "differences.json"
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(SCRIPT.parent), os.environ.get("PYTHONPATH", "")])}
    done = run_quietly([sys.executable, str(SCRIPT), str(file)], env=environment)
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(file.read_text())


@pytest.mark.parametrize("case", [*CASES, "llama-by_position, packed", "gates in some layers"])
def test_two_halves_are_the_whole(differences: dict[str, dict[str, float]], case: str):
    """Documents cross the middle of the row and are padded there; the gradient is summed over both ranks."""
    assert differences[case].keys() == {"teacher", "student", "log_beta", "gates", "capacity"}
    assert max(differences[case].values()) < 1e-5, differences[case]  # fp32, the gates' sums in another order
