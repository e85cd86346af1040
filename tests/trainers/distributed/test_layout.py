"""How a run is spread over processes, before anything is loaded."""

from pathlib import Path

import pytest
import torch
from tiny_training import arguments, trainer_of

from retention_gates.trainers.distributed.layout import accumulation_steps, check_devices, check_launch


def test_a_launch_of_several_that_started_one_is_refused(monkeypatch: pytest.MonkeyPatch):
    """What accelerate launch --cpu --num_processes 2 leaves in the environment of its only process."""
    monkeypatch.setenv("MASTER_PORT", "29500")
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    with pytest.raises(ValueError, match="asked for several .* alone.*torchrun.*training.use_cpu=true"):
        check_launch(None, 1)
    monkeypatch.setenv("WORLD_SIZE", "1")  # torchrun --nproc_per_node 1
    check_launch(None, 1)


def test_the_number_of_ranks_is_what_the_file_says(tmp_path: Path):
    with pytest.raises(ValueError, match="ranks=2 processes .* and 1 run: .*torchrun.*training.use_cpu=true"):
        arguments(tmp_path, ranks=2)
    assert arguments(tmp_path, ranks=1).ranks == 1
    with pytest.raises(ValueError, match="ranks=0 must be a whole number"):
        arguments(tmp_path, ranks=0)


def test_rows_per_step_decide_the_passes(tmp_path: Path):
    assert arguments(tmp_path, rows_per_step=6).gradient_accumulation_steps == 3
    assert arguments(tmp_path, rows_per_step=6, gradient_accumulation_steps=3).gradient_accumulation_steps == 3
    with pytest.raises(ValueError, match="gradient_accumulation_steps=2 contradicts rows_per_step=6, which needs 3"):
        arguments(tmp_path, rows_per_step=6, gradient_accumulation_steps=2)
    with pytest.raises(ValueError, match="rows_per_step=7 rows can't be divided among 1 ranks.* a multiple of 2"):
        arguments(tmp_path, rows_per_step=7)
    assert accumulation_steps(64, 2, 8) == 4
    with pytest.raises(ValueError, match="a multiple of 16, such as 16"):
        accumulation_steps(8, 2, 8)


def test_checkpoints_stay_non_reentrant_whatever_else_is_given(tmp_path: Path):
    kept = arguments(tmp_path, gradient_checkpointing_kwargs={"offload": True}).gradient_checkpointing_kwargs
    assert kept == {"use_reentrant": False, "offload": True}
    with pytest.raises(ValueError, match="offload=True moves checkpoints from a GPU.*no GPU here"):
        trainer_of(tmp_path, gradient_checkpointing_kwargs={"offload": True})
    with pytest.raises(ValueError, match="the reentrant form would lose the gradient"):
        arguments(tmp_path, gradient_checkpointing_kwargs={"use_reentrant": True})


def test_more_processes_than_gpus_are_refused(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(ValueError, match="4 processes were started on a machine with 2 GPUs: launch with --num_proc"):
        check_devices(use_cpu=False)
    check_devices(use_cpu=True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    check_devices(use_cpu=False)


def test_processes_that_would_each_run_alone_are_refused(monkeypatch: pytest.MonkeyPatch):
    """What Accelerate makes of DeepSpeed on a machine with no accelerator."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="started 2 processes, but .* alone.*torchrun.*training.use_cpu=true"):
        check_launch(None, 1)
