"""Two ranks killed at random moments end as if nobody had."""

import os
import signal
import sys
import time
from pathlib import Path

import pytest
from tiny_run import make_run, run_quietly
from tqdm import tqdm
from waiting import wait_for

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


def test_a_process_killed_while_it_draws_a_bar_leaves_no_lock(tmp_path, monkeypatch):
    def main(arguments: list[str]) -> int:
        with tqdm.get_lock():
            Path(arguments[1]).touch()
            time.sleep(float(arguments[2]))
        return 0

    monkeypatch.setattr(kill_resume.cli, "main", main)
    tqdm.get_lock()  # the one that forked processes would share
    (held,) = kill_resume.start_ranks([str(tmp_path / "held"), "60"], 1, tmp_path / "said")
    wait_for(lambda: (tmp_path / "held").exists(), 20)
    os.kill(held, signal.SIGKILL)
    os.waitpid(held, 0)
    (free,) = kill_resume.start_ranks([str(tmp_path / "free"), "0"], 1, tmp_path / "said")
    try:
        wait_for(lambda: (tmp_path / "free").exists(), 20)
    finally:
        os.kill(free, signal.SIGKILL)
        os.waitpid(free, 0)
