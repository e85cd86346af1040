"""log.jsonl when a run goes on."""

import json
from pathlib import Path

import pytest
from tiny_training import arguments
from transformers import TrainerControl, TrainerState

from retention_gates.trainers.callbacks import LOG_NAME, JsonLinesLog

LINES = [json.dumps({"step": step, "loss": 1.0}) + "\n" for step in range(1, 6)]


def resume(folder: Path, step: int) -> None:
    JsonLinesLog(folder).on_train_begin(arguments(folder), TrainerState(global_step=step), TrainerControl())


@pytest.mark.parametrize("step, kept", [(3, 3), (5, 5), (0, 0)])
def test_the_log_goes_back_to_the_checkpoint(tmp_path: Path, step: int, kept: int):
    (tmp_path / LOG_NAME).write_text("".join(LINES) + '{"step": 6, "lo', encoding="utf-8")
    resume(tmp_path, step)
    assert (tmp_path / LOG_NAME).read_text(encoding="utf-8") == "".join(LINES[:kept])
    assert [path.name for path in tmp_path.iterdir()] == [LOG_NAME]


def test_a_full_disk_leaves_the_log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def full(path: Path, text: str, **options: str) -> None:
        path.write_bytes(b"")  # what opening for writing leaves
        raise OSError(28, "No space left on device")

    (tmp_path / LOG_NAME).write_text("".join(LINES), encoding="utf-8")
    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(OSError, match="No space left"):
        resume(tmp_path, 3)
    assert (tmp_path / LOG_NAME).read_text(encoding="utf-8") == "".join(LINES)
