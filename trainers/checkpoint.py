"""Folders that are written as a whole or not at all, and the last checkpoint that is whole."""

import json
import os
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

STAGING = ".staging"
MANIFEST = "manifest.json"
MANIFEST_VERSION = 1


class SaveError(OSError, ValueError):
    """A folder could not be written; what was there before is as it was."""


@contextmanager
def whole_folder(target: Path, *, is_writer: bool = True, barrier: Callable[[], Any] = lambda: None) -> Iterator[Path]:
    """A folder to write into, which takes the name `target` when the block ends, and never before.

    It is filled under `.staging` beside the target and renamed once every file is on the disk, so that a process
    killed at any moment leaves either no `target` or all of it. Every rank enters; the writer renames.

    Raises:
        SaveError: if writing fails, a full disk for instance; what was written so far is removed.
    """
    staging = target.parent / STAGING / target.name
    try:
        if is_writer:
            shutil.rmtree(staging, ignore_errors=True)
            staging.mkdir(parents=True)
        barrier()
        yield staging
        barrier()
        if is_writer:
            _flush(staging)
            remove_folder(target)
            os.replace(staging, target)
            _flush_entry(target.parent)
            _tidy(staging.parent)
    except (OSError, RuntimeError, SafetensorError) as error:  # torch.save reports a full disk as a RuntimeError
        if is_writer:
            shutil.rmtree(staging, ignore_errors=True)
            _tidy(staging.parent)
        raise SaveError(_explain(target, error)) from error
    barrier()


def remove_folder(folder: Path) -> None:
    """Removes a folder so that no half of it is ever seen under its name."""
    if not folder.exists():
        return
    doomed = folder.parent / STAGING / f"{folder.name}.removed"
    shutil.rmtree(doomed, ignore_errors=True)
    doomed.parent.mkdir(exist_ok=True)
    os.replace(folder, doomed)
    shutil.rmtree(doomed)
    _tidy(doomed.parent)


def remove_unfinished(output_dir: Path) -> None:
    """Removes what a killed process left half-written."""
    shutil.rmtree(output_dir / STAGING, ignore_errors=True)


def write_manifest(folder: Path, facts: dict[str, Any]) -> None:
    """The last file of a checkpoint: the size in bytes of all others, and `facts` of the run that wrote it."""
    files = {str(p.relative_to(folder)): p.stat().st_size for p in sorted(folder.rglob("*")) if p.is_file()}
    manifest = {"version": MANIFEST_VERSION, "files": files, **facts}
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=2), encoding="utf-8")


def read_manifest(checkpoint: Path) -> dict[str, Any]:
    """The manifest of a whole checkpoint.

    Raises:
        ValueError: if the folder is no checkpoint of ours, or a file of it is missing or cut short.
    """
    try:
        manifest = json.loads((checkpoint / MANIFEST).read_text(encoding="utf-8"))
    except (OSError, json.JSONDecodeError) as error:
        raise ValueError(f"{checkpoint} is no checkpoint of ours: it has no readable {MANIFEST} ({error}).") from error
    if manifest.get("version") != MANIFEST_VERSION:
        raise ValueError(
            f"{checkpoint} is of version {manifest.get('version')!r}, this trainer reads version {MANIFEST_VERSION}: "
            "go on with the retention-gates that wrote it."
        )
    for name, size in manifest["files"].items():
        path = checkpoint / name
        found = path.stat().st_size if path.is_file() else "none"
        if found != size:
            raise ValueError(
                f"{path} should have {size} bytes and has {found}: the checkpoint is not whole. Remove {checkpoint} "
                "to go on from the one before."
            )
    return manifest


def checkpoints_in(output_dir: Path) -> list[Path]:
    """Checkpoint folders by step, first to last."""
    found = {int(m[1]): p for p in output_dir.glob("checkpoint-*") if (m := re.fullmatch(r"checkpoint-(\d+)", p.name))}
    return [found[step] for step in sorted(found)]


def last_checkpoint(output_dir: Path) -> Path | None:
    """The checkpoint of the latest step, None if there is none yet.

    Raises:
        ValueError: if it isn't whole; this trainer leaves none like that, so somebody else changed it.
    """
    checkpoints = checkpoints_in(output_dir)
    if not checkpoints:
        return None
    read_manifest(checkpoints[-1])
    return checkpoints[-1]


def _tidy(staging_root: Path) -> None:
    with suppress(OSError):  # something else is being written there
        staging_root.rmdir()


def _flush(folder: Path) -> None:
    for path in [*folder.rglob("*"), folder]:
        _flush_entry(path)


def _flush_entry(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _explain(target: Path, error: Exception) -> str:
    checkpoints = checkpoints_in(target.parent)
    kept = f"{checkpoints[-1]} is intact" if checkpoints else "no checkpoint had been written before"
    free = shutil.disk_usage(target.parent if target.parent.exists() else Path.cwd()).free / 2**20
    return (
        f"{target} could not be written: {error}. {free:.0f} MiB are free on its disk; {kept}. Make room (or lower "
        "save_total_limit) and start the same command again with resume=true."
    )
