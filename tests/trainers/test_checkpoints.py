"""What is saved, when the disk is full too, and what can be resumed from."""

import errno
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny_training import trainer_of

from retention_gates.trainers.checkpoint import STAGING, SaveError, checkpoints_in, last_checkpoint, read_manifest
from retention_gates.trainers.distributed.layout import check_same_run


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
    with pytest.raises(ValueError, match="engine = replicated, now it is fsdp"):
        check_same_run(tmp_path, manifest_of(tmp_path), manifest_of(tmp_path) | {"engine": "fsdp"})
    with pytest.raises(ValueError, match="base_model = None, now it is other/model"):
        check_same_run(tmp_path, manifest_of(tmp_path), manifest_of(tmp_path) | {"base_model": "other/model"})


def manifest_of(folder: Path) -> dict:
    return read_manifest(folder / "out" / "checkpoint-6")


def test_other_ranks_keep_the_rows_and_are_told_what_changes(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    trainer_of(tmp_path).train()
    before = manifest_of(tmp_path)
    check_same_run(tmp_path, before, before)
    assert not caplog.messages
    check_same_run(tmp_path, before, before | {"ranks": 2})
    assert "was written by 1 ranks, now there are 2. Steps see the same rows in the same order." in caplog.text
    with pytest.raises(ValueError, match=r"rows_per_step = 2, now it is 4.* On 2 ranks, training.rows_per_step=2"):
        check_same_run(tmp_path, before, before | {"ranks": 2, "rows_per_step": 4})
    with pytest.raises(ValueError, match="each with its part of DeepSpeed's state"):
        check_same_run(tmp_path, before | {"engine": "deepspeed"}, before | {"engine": "deepspeed", "ranks": 2})


def cut_short(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:100])


def turn_a_bit(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[200] ^= 1
    file.write_bytes(content)


@pytest.mark.parametrize("damage, said", [(cut_short, "has 100: .*not whole"), (turn_a_bit, "is damaged")])
def test_a_damaged_checkpoint_is_named_and_the_one_before_taken(tmp_path: Path, caplog, damage, said: str):
    trainer_of(tmp_path).train()
    output_dir = tmp_path / "out"
    unbroken = load_file(output_dir / "checkpoint-6" / "adapter_model.safetensors")
    damage(output_dir / "checkpoint-6" / "optimizer.pt")
    resumed = trainer_of(tmp_path)
    resumed.train(resume_from_checkpoint=True)
    (told,) = [message for message in caplog.messages if "checkpoint-6.damaged" in message]
    assert re.search(said, told) and "the run goes on from checkpoint-3" in told
    assert [path.name for path in checkpoints_in(output_dir)] == ["checkpoint-3", "checkpoint-6"]
    again = load_file(output_dir / "checkpoint-6" / "adapter_model.safetensors")
    assert all((again[key] == weights).all() for key, weights in unbroken.items())

    for checkpoint in checkpoints_in(output_dir):
        (checkpoint / "manifest.json").unlink()
    with pytest.raises(ValueError, match="no checkpoint of ours.*There is no other checkpoint to go on from"):
        trainer_of(tmp_path).train(resume_from_checkpoint=True)
    assert len(checkpoints_in(output_dir)) == 2  # left as they are


MANIFESTS = ["[]", "null", "3", "{}", '{"version": 2}', '{"version": 2, "files": []}', "[" * 100_000, "", "\x00"]
MANIFESTS += [
    '{"version": 2, "files": {"optimizer.pt": 7}}',
    '{"version": 2, "files": {"optimizer.pt": {"bytes": 1}}}',
]


def test_a_damaged_manifest_sets_its_checkpoint_aside(tmp_path: Path, caplog):
    trainer_of(tmp_path).train()
    output_dir = tmp_path / "out"
    manifest = output_dir / "checkpoint-6" / "manifest.json"
    written = manifest.read_text()
    for damaged in [*MANIFESTS, written.replace('"global_step"', '"step"', 1).replace("rows_per_step", "rows")]:
        manifest.write_text(damaged)
        with pytest.raises(ValueError, match="checkpoint-6 is (no checkpoint of ours|damaged|of version)"):
            read_manifest(manifest.parent)
    assert last_checkpoint(output_dir) == output_dir / "checkpoint-3"
    assert (output_dir / "checkpoint-6.damaged" / "manifest.json").is_file()
