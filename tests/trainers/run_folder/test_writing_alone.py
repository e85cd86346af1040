"""One process at a time writes to a folder, and its death, however it comes, lets the next one in."""

import errno
import json
import os
import re
import socket
import subprocess
import sys
import time
from contextlib import ExitStack
from pathlib import Path

import held_folder
import pytest
from held_folder import held_by_another
from tiny_training import trainer_of

from retention_gates.trainers.run_folder import writing_alone as module
from retention_gates.trainers.run_folder.writing_alone import WRITING, FolderTaken, writing_alone

HOST = socket.gethostname()
COUNT = held_folder.__file__


def test_another_process_is_refused_with_who_writes_until_it_is_killed(tmp_path: Path):
    with held_by_another(tmp_path) as process:
        said = rf"a run is writing here \(pid {process.pid}, host {re.escape(HOST)}, since \d{{4}}-.* UTC\)"
        for _ in range(2):  # to be refused takes nothing from who writes
            with pytest.raises(FolderTaken, match=said), writing_alone(tmp_path):
                pass
        process.kill()
        process.wait()
        with writing_alone(tmp_path):
            assert json.loads((tmp_path / WRITING).read_text())["pid"] == os.getpid()
    assert not (tmp_path / WRITING).exists()


def test_blocks_inside_of_a_block_hold_the_folder_too_whatever_it_is_called(tmp_path: Path):
    link = tmp_path.with_name(f"{tmp_path.name}-link")
    link.symlink_to(tmp_path)
    with writing_alone(tmp_path):
        with writing_alone(link), pytest.raises(KeyError), writing_alone(tmp_path / "."):
            raise KeyError
        assert (tmp_path / WRITING).exists()
    assert not (tmp_path / WRITING).exists()


def test_a_folder_that_is_gone_at_the_end_is_no_error(tmp_path: Path):
    folder = tmp_path / "short"
    folder.mkdir()
    with writing_alone(folder):
        (folder / WRITING).unlink()
        folder.rmdir()


def test_processes_that_race_never_hold_it_together(tmp_path: Path):
    (tmp_path / "counter").write_text("0")
    racers = [subprocess.Popen([sys.executable, COUNT, tmp_path, str(seed), "40"]) for seed in range(3)]
    assert [racer.wait() for racer in racers] == [0, 0, 0]
    assert (tmp_path / "counter").read_text() == "120" and not (tmp_path / WRITING).exists()


def test_children_of_the_process_do_not_hold_it(tmp_path: Path):
    """As workers of a data loader do for seconds after their parent was killed."""
    with ExitStack() as held:
        held.enter_context(writing_alone(tmp_path))
        child = os.fork()
        if child == 0:
            time.sleep(60)
            os._exit(0)
        held.close()
        with held_by_another(tmp_path):
            pass
        os.kill(child, 9)
        os.waitpid(child, 0)


def test_a_run_on_another_host_that_did_not_end_is_told(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    record = {"pid": 12, "host": "node7", "since": "2026-01-02 03:04:05 UTC"}
    (tmp_path / WRITING).write_text(json.dumps(record))
    with writing_alone(tmp_path):
        pass
    assert "(pid 12, host node7, since 2026-01-02 03:04:05 UTC)" in caplog.text
    assert "hosts do not share locks" in caplog.text


@pytest.mark.parametrize("left", ["", "{", "[]", "[" * 3000, '{"pid": "x"}'])
def test_a_record_that_cannot_be_read_keeps_nobody_out(tmp_path: Path, left: str):
    (tmp_path / WRITING).write_text(left)
    with writing_alone(tmp_path):
        assert json.loads((tmp_path / WRITING).read_text())["host"] == HOST


def test_without_locks_the_record_decides(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def no_locks(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    ended = subprocess.Popen(["true"])
    ended.wait()
    monkeypatch.setattr(module.fcntl, "lockf", no_locks)
    records = [(os.getppid(), HOST, False), (ended.pid, "node7", False), (ended.pid, HOST, True)]
    for pid, host, is_free in records:
        (tmp_path / WRITING).write_text(json.dumps({"pid": pid, "host": host, "since": "then"}))
        if is_free:
            with writing_alone(tmp_path):
                pass
            continue
        said = rf"pid {pid}, host {host}, since then.*keeps no locks: if that run has ended, delete .*{WRITING}"
        with pytest.raises(FolderTaken, match=said), writing_alone(tmp_path):
            pass


def test_a_trainer_is_refused_before_it_removes_anything(tmp_path: Path):
    trainer = trainer_of(tmp_path, max_steps=1)
    out = tmp_path / "out"
    with held_by_another(out):
        unfinished = out / ".staging" / "checkpoint-3" / "weights"
        unfinished.parent.mkdir(parents=True)
        unfinished.touch()
        for resume in (None, True):
            with pytest.raises(FolderTaken, match="a run is writing here"):
                trainer.train(resume_from_checkpoint=resume)
        assert unfinished.exists()
    trainer.train()
    assert not unfinished.exists() and not (out / WRITING).exists()
