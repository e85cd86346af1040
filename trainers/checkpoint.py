"""Folders that are written as a whole or not at all, and the last checkpoint that is whole."""

import hashlib
import json
import logging
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
MANIFEST_VERSION = 2
DAMAGED = ".damaged"

logger = logging.getLogger(__name__)


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
    """The last file of a checkpoint: size in bytes and SHA-256 of all others, and `facts` of the run that wrote it."""
    paths = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    files = {str(p.relative_to(folder)): {"bytes": p.stat().st_size, "sha256": _digest(p)} for p in paths}
    manifest = {"version": MANIFEST_VERSION, "files": files, **facts}
    manifest["digest"] = _digest_of(manifest)
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=2), encoding="utf-8")


def read_manifest(checkpoint: Path) -> dict[str, Any]:
    """The manifest of a whole checkpoint.

    Raises:
        ValueError: if the folder is no checkpoint of ours, or a file of it is missing, cut short or altered.
    """
    try:
        manifest = json.loads((checkpoint / MANIFEST).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{checkpoint} is no checkpoint of ours: it has no readable {MANIFEST} ({error}).") from error
    if not isinstance(manifest, dict):
        kind = type(manifest).__name__
        raise ValueError(f"{checkpoint} is damaged: its {MANIFEST} holds a {kind} and no object of keys.")
    if manifest.get("version") != MANIFEST_VERSION:
        raise ValueError(
            f"{checkpoint} is of version {manifest.get('version')!r}, this trainer reads version {MANIFEST_VERSION}: "
            "go on with the retention-gates that wrote it."
        )
    if not _is_file_list(manifest.get("files")):
        raise ValueError(f"{checkpoint} is damaged: its {MANIFEST} does not say which files belong to it.")
    if manifest.get("digest", _digest_of(manifest)) != _digest_of(manifest):
        raise ValueError(f"{checkpoint} is damaged: its {MANIFEST} was changed after it was written.")
    for name, written in manifest["files"].items():
        path = checkpoint / name
        found = path.stat().st_size if path.is_file() else "none"
        if found != written["bytes"]:
            raise ValueError(
                f"{path} should have {written['bytes']} bytes and has {found}: the checkpoint is not whole."
            )
        if _digest(path) != written["sha256"]:
            raise ValueError(f"{path} has the size it was written with and other content: the checkpoint is damaged.")
    return manifest


def checkpoints_in(output_dir: Path) -> list[Path]:
    """Checkpoint folders by step, first to last."""
    found = {int(m[1]): p for p in output_dir.glob("checkpoint-*") if (m := re.fullmatch(r"checkpoint-(\d+)", p.name))}
    return [found[step] for step in sorted(found)]


def last_checkpoint(
    output_dir: Path, *, is_writer: bool = True, barrier: Callable[[], Any] = lambda: None
) -> Path | None:
    """The checkpoint of the latest step that is whole, None if there is none at all.

    This trainer leaves only whole ones, so somebody or something else changed one that is not. It is named in the log
    and set aside under another name; the run goes on from the one before. Every rank calls; the writer renames.

    Raises:
        ValueError: if there are checkpoints and none of them is whole.
    """
    checkpoints, problems = checkpoints_in(output_dir), []
    for checkpoint in reversed(checkpoints):
        try:
            read_manifest(checkpoint)
        except ValueError as error:
            problems.append((checkpoint, str(error)))
            continue
        barrier()
        for damaged, problem in problems if is_writer else ():
            kept = damaged.with_name(damaged.name + DAMAGED)
            shutil.rmtree(kept, ignore_errors=True)
            os.replace(damaged, kept)
            logger.warning("%s It is kept as %s; the run goes on from %s.", problem, kept.name, checkpoint.name)
        barrier()
        return checkpoint
    if problems:
        raise ValueError(" ".join(problem for _, problem in problems) + " There is no other checkpoint to go on from.")
    return None


def drop_old(output_dir: Path, limit: int | None, best: str | None) -> None:
    """Removes the oldest checkpoints above `limit`; the last one and `best` stay."""
    checkpoints = checkpoints_in(output_dir)
    kept = {str(checkpoints[-1]), best} - {None}
    surplus = len(checkpoints) - max(limit or len(checkpoints), len(kept))
    for checkpoint in [c for c in checkpoints if str(c) not in kept][: max(0, surplus)]:
        remove_folder(checkpoint)


def _is_file_list(files: Any) -> bool:
    return isinstance(files, dict) and all(
        isinstance(entry, dict) and {"bytes", "sha256"} <= entry.keys() for entry in files.values()
    )


def _digest_of(manifest: dict[str, Any]) -> str:
    """SHA-256 of a manifest without its own digest."""
    content = {key: value for key, value in manifest.items() if key != "digest"}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


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
