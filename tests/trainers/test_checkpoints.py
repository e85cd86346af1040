"""What is saved, when the disk is full too, and what can be resumed from."""

import errno
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny_training import trainer_of

from retention_gates.trainers.checkpoint import STAGING, SaveError, checkpoints_in, last_checkpoint


def test_a_checkpoint_is_the_adapter_and_the_trainers_state(tmp_path: Path):
    trainer = trainer_of(tmp_path, save_total_limit=1)
    trainer.train()
    output_dir = tmp_path / "out"
    assert [path.name for path in checkpoints_in(output_dir)] == ["checkpoint-6"]
    assert not (output_dir / STAGING).exists()
    checkpoint = output_dir / "checkpoint-6"
    adapter = {"adapter_config.json", "adapter_model.safetensors", "README.md"}
    state = {"manifest.json", "optimizer.pt", "rng_state.pth", "scheduler.pt", "trainer_state.json"}
    assert {path.name for path in checkpoint.iterdir()} == adapter | state
    assert all("retention_gate" in key for key in load_file(checkpoint / "adapter_model.safetensors"))
    trainer.save_adapter(tmp_path / "adapter")
    trainer.save_adapter(tmp_path / "adapter")  # over the one before
    assert {path.name for path in (tmp_path / "adapter").iterdir()} == adapter


def test_the_best_checkpoint_is_kept_and_loaded(tmp_path: Path):
    rows = torch.randint(3, 97, (2, 40), generator=torch.Generator().manual_seed(5))
    best = {"load_best_model_at_end": True, "metric_for_best_model": "kl_8", "eval_strategy": "steps", "eval_steps": 2}
    trainer = trainer_of(tmp_path, eval_rows=rows, save_steps=2, save_total_limit=1, learning_rate=0.1, **best)
    assert trainer.args.greater_is_better is False
    trainer.train()
    scores = {line["step"]: line["eval_kl_8"] for line in trainer.state.log_history if "eval_kl_8" in line}
    step = min(scores, key=lambda step: scores[step])
    assert trainer.state.best_model_checkpoint == str(tmp_path / "out" / f"checkpoint-{step}")
    assert trainer.evaluate()["eval_kl_8"] == pytest.approx(scores[step], rel=1e-6)


def full_disk(*args, **kwargs):
    raise OSError(errno.ENOSPC, "No space left on device")


def broken_writer(*args, **kwargs):  # what torch.save says on a full disk
    raise RuntimeError("PytorchStreamWriter failed writing file data/0: file write failed")


@pytest.mark.parametrize("failure", [full_disk, broken_writer])
def test_a_full_disk_leaves_the_old_checkpoint_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failure):
    trainer = trainer_of(tmp_path)
    save, saved = torch.save, []

    def save_until_full(value, path, *args, **kwargs):
        saved.append(path)
        (failure if len(saved) == 5 else save)(value, path, *args, **kwargs)  # the second file of checkpoint-6

    monkeypatch.setattr(torch, "save", save_until_full)
    with pytest.raises(SaveError, match=r"checkpoint-6 could not be written.*MiB are free.*checkpoint-3 is intact"):
        trainer.train()
    assert issubclass(SaveError, ValueError)
    output_dir = tmp_path / "out"
    assert last_checkpoint(output_dir) == output_dir / "checkpoint-3"
    assert not (output_dir / STAGING).exists()


def test_resuming_is_refused_where_it_would_not_be_exact(tmp_path: Path):
    trainer_of(tmp_path).train()
    with pytest.raises(ValueError, match="holds the checkpoints of an earlier run, checkpoint-6 the last"):
        trainer_of(tmp_path).train()
    with pytest.raises(ValueError, match="rows_per_step = 2, now it is 3"):
        trainer_of(tmp_path, per_device_train_batch_size=3).train(resume_from_checkpoint=True)
    with pytest.raises(ValueError, match="seed = 42, now it is 7"):
        trainer_of(tmp_path, seed=7).train(resume_from_checkpoint=True)
    with pytest.raises(ValueError, match="no checkpoint"):
        trainer_of(tmp_path / "new").train(resume_from_checkpoint=True)
    optimiser = tmp_path / "out" / "checkpoint-6" / "optimizer.pt"
    optimiser.write_bytes(optimiser.read_bytes()[:100])
    with pytest.raises(ValueError, match="should have .* bytes and has 100: the checkpoint is not whole"):
        trainer_of(tmp_path).train(resume_from_checkpoint=True)
    (tmp_path / "out" / "checkpoint-6" / "manifest.json").unlink()
    with pytest.raises(ValueError, match="no checkpoint of ours"):
        trainer_of(tmp_path).train(resume_from_checkpoint=True)
