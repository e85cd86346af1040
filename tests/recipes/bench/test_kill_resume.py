"""Two ranks killed at random moments end as if nobody had."""

import sys
from pathlib import Path

import pytest
from tiny_run import make_run, run_quietly

from retention_gates.recipes.bench import kill_resume


@pytest.mark.parametrize("kills", [3, pytest.param(20, marks=pytest.mark.slow)])
def test_two_ranks_survive_kills(tmp_path: Path, kills: int):
    options = {"per_device_train_batch_size": 1, "save_steps": 2, "logging_steps": 2, "disable_tqdm": True}
    options |= {"max_steps": 6, "eval_strategy": "no"}
    config = make_run(tmp_path, layers=2, objective="end_to_end", **options)
    script = str(Path(kill_resume.__file__).resolve())
    done = run_quietly([sys.executable, script, str(config), "--kills", str(kills), "--seed", str(kills)])
    assert done.returncode == 0, done.stdout + done.stderr[-2000:] + (tmp_path / "output.txt").read_text()[-2000:]
    assert f"{kills} kills: " in done.stdout
    if kills >= 20:
        assert "while saving" in done.stdout
