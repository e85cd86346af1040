"""A run that is killed at any moment goes on as if it had not been."""

import json
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file
from tiny_run import logged, make_run, run_quietly, train_command

from retention_gates.trainers.checkpoint import STAGING, checkpoints_in, last_checkpoint

DRIVER = Path(__file__).parents[1] / "support" / "killed_runs.py"
TRAINER = "retention_gates.trainers.trainer:RetentionTrainer."
CHECKPOINT = "retention_gates.trainers.checkpoint:"


def death(function: str, call: int, when: str = "before") -> dict:
    return {"function": function, "call": call, "when": when}


# 8 steps of 2 forward passes, a log every 2 and at every save, checkpoints after steps 3, 6 and 8, evaluations after 4
# and 8. Every start but the first resumes, and calls count anew.
SCENARIOS = {
    "unbroken": [None],
    "early": [
        death(TRAINER + "compute_loss", 4, "after"),  # in step 2, before any checkpoint
        death(TRAINER + "_save_optimizer_and_scheduler", 1),  # in the first save
        death("torch.optim:AdamW.step", 5),
        death("retention_gates.trainers.evaluation.while_training:compare_rows", 1),  # while evaluating, from step 3
        death(TRAINER + "_save_rng_state", 1),  # in the second save
        None,
    ],
    "late": [
        death(CHECKPOINT + "_flush", 2, "after"),  # the second save has all its files but not its name
        death(TRAINER + "compute_loss", 8),  # in step 7, from step 3
        death("retention_gates.trainers.checkpoint:drop_old", 1),  # after the last save
        death(TRAINER + "save_adapter", 1),
        None,
    ],
    "last": [
        death("shutil:rmtree", 6),  # while the oldest checkpoint is removed
        death(CHECKPOINT + "_flush", 1),  # in the save of the adapter
        None,
    ],
}


def steps(output_dir: Path) -> list[dict]:
    """What was logged of steps and evaluations; the summary at the end is of the last process only."""
    return [line for line in logged(output_dir) if "loss" in line or "eval_kl_8" in line]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    config = make_run(folder, layers=2, objective="end_to_end", gradient_accumulation_steps=2, logging_steps=2)
    scenarios = folder / "scenarios.json"
    scenarios.write_text(json.dumps(SCENARIOS))
    done = run_quietly([sys.executable, str(DRIVER), str(config), str(scenarios)])
    assert done.returncode == 0, done.stderr[-3000:]
    return folder


@pytest.mark.parametrize("name", [name for name in SCENARIOS if name != "unbroken"])
def test_a_killed_run_goes_on_bit_for_bit(runs: Path, name: str):
    lines, reference = steps(runs / name), steps(runs / "unbroken")
    assert [line["step"] for line in reference if "loss" in line] == [2, 3, 4, 6, 8]
    assert lines == reference
    adapters = [load_file(runs / run / "adapter" / "adapter_model.safetensors") for run in (name, "unbroken")]
    assert all((adapters[0][key] == weights).all() for key, weights in adapters[1].items())
    configs = [(runs / run / "adapter" / "adapter_config.json").read_text() for run in (name, "unbroken")]
    assert configs[0] == configs[1]


@pytest.mark.parametrize("name", SCENARIOS)
def test_nothing_unfinished_is_left(runs: Path, name: str):
    assert not (runs / name / STAGING).exists()
    assert [path.name for path in checkpoints_in(runs / name)] == ["checkpoint-6", "checkpoint-8"]
    assert last_checkpoint(runs / name) == runs / name / "checkpoint-8"


def test_the_command_itself_is_the_same_run(runs: Path):
    done = run_quietly(train_command(str(runs / "config.yaml"), f"training.output_dir={runs / 'command'}"))
    assert done.returncode == 0, done.stderr[-3000:]
    assert steps(runs / "command") == steps(runs / "unbroken")
