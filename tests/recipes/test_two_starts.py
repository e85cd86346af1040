"""A second command is told that one is writing to its folder, and changes nothing there."""

from pathlib import Path

import pytest
import yaml
from held_folder import held_by_another
from tiny_run import logged, make_run

from retention_gates import cli
from retention_gates.recipes.bench.kill_resume import run_until, start_ranks
from retention_gates.recipes.comparison.result_store import ResultStore
from retention_gates.recipes.loading.output_folder import MARKER, release_outputs

SHORT = {"layers": 2, "max_steps": 2, "save_steps": 1, "eval_strategy": "no"}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The file of a run that has ended."""
    config = make_run(tmp_path_factory.mktemp("run"), **SHORT)
    assert cli.main(["train", str(config)]) == 0
    return config


def content(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_every_command_that_would_write_there_is_refused(run: Path, capsys: pytest.CaptureFixture):
    out = run.parent / "out"
    text = ["--text", str(run.parent / "texts"), "--length", "48"]
    adapter = ["--adapter", str(out / "adapter")]
    commands = [
        ["train", str(run)],
        ["train", str(run), "resume=true"],
        ["evaluate", *adapter, *text, "--memory-size", "8", "--output", str(out)],
        ["evaluate", *adapter, "--suites", "gsm8k", "--output", str(out)],
        ["inspect", *adapter, *text, "--output", str(out)],
        ["calibrate", *adapter, *text, "--output", str(out)],
    ]
    with held_by_another(out) as process:
        before = content(out)
        for command in commands:
            assert cli.main(command) == 2, command
            assert f"a run is writing here (pid {process.pid}, host" in capsys.readouterr().err, command
        assert content(out) == before
    with held_by_another(out / "adapter"):
        assert cli.main(["calibrate", *adapter, *text]) == 2
        assert "a run is writing here" in capsys.readouterr().err
    assert cli.main(["train", str(run), "resume=true"]) == 0


def test_of_two_starts_into_a_new_folder_one_runs(tmp_path: Path, capfd: pytest.CaptureFixture):
    config = make_run(tmp_path, **SHORT)
    rates = ["0.01", "0.03"]
    pids = [start_ranks([str(config), f"training.learning_rate={rate}"], 1, tmp_path / "said")[0] for rate in rates]
    codes = run_until(pids, lambda: False, 0, lambda: None)
    said = capfd.readouterr().err
    assert sorted(codes) == [0, 2], said
    assert "is writing here" in said or "holds a training run already" in said
    rate = rates[codes.index(0)]
    assert yaml.safe_load((tmp_path / "out" / "run.yaml").read_text())["training"]["learning_rate"] == float(rate)
    alone = [f"training.learning_rate={rate}", f"training.output_dir={tmp_path / 'alone'}"]
    assert cli.main(["train", str(config), *alone]) == 0
    weights = "adapter/adapter_model.safetensors"
    assert (tmp_path / "out" / weights).read_bytes() == (tmp_path / "alone" / weights).read_bytes()
    assert logged(tmp_path / "out")[:-1] == logged(tmp_path / "alone")[:-1]


def test_ranks_are_refused_together(run: Path, capfd: pytest.CaptureFixture):
    with held_by_another(run.parent / "out"):
        pids = start_ranks([str(run), "resume=true"], 2, run.parent / "said")
        assert run_until(pids, lambda: False, 0, lambda: None) == [2, 2]
    assert capfd.readouterr().err.count("a run is writing here") == 2


def test_scores_that_another_process_has_written_are_kept(tmp_path: Path):
    stores = [ResultStore(tmp_path / "out") for _ in range(2)]
    stores[0].add([({"n": 1}, [{"kl": 0.5}])])
    with pytest.raises(ValueError, match="was written by another process in the meantime: start again"):
        stores[1].add([({"n": 2}, [{"kl": 0.7}])])
    stores[0].add([({"n": 3}, [{"kl": 0.9}])])
    release_outputs()
    assert len(ResultStore(tmp_path / "out").found) == 2
    assert {path.name for path in (tmp_path / "out").iterdir()} == {MARKER, "scores.jsonl"}
