"""A folder that one process at a time writes to."""

import errno
import json
import logging
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

try:
    import fcntl
except ImportError:  # Windows has no such locks
    fcntl = None  # type: ignore[assignment]

WRITING = ".writing"
TAKEN = (errno.EACCES, errno.EAGAIN)
NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EINVAL, errno.EOPNOTSUPP)

logger = logging.getLogger(__name__)
_holders: dict[tuple[int, Path], int] = {}  # process and file -> how many blocks of this process hold it


class FolderTaken(ValueError):
    """Another process is writing to the folder."""


@contextmanager
def writing_alone(folder: Path) -> Iterator[None]:
    """Holds an existing folder for this process until the block ends; blocks inside of the block hold it, too.

    The file `.writing` in it is locked, and says which process holds it. The system releases the lock when the process
    dies in any way. It is a POSIX lock: children of the process do not inherit it, and NFS shares it between hosts.

    Raises:
        FolderTaken: if another process holds the folder.
    """
    key = (os.getpid(), folder.resolve() / WRITING)
    descriptor = None if _holders.get(key) else _lock(key[1])
    _holders[key] = _holders.get(key, 0) + 1
    try:
        yield
    finally:
        _holders[key] -= 1
        if descriptor is not None:  # the outermost block, which ends last
            with suppress(OSError):  # the folder is gone
                if _is_at(descriptor, key[1]):
                    key[1].unlink()  # before the lock is released: nobody else can have taken this file
            os.close(descriptor)


def _lock(path: Path) -> int:
    """A descriptor of the locked file."""
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            _take(descriptor, path)
            if _is_at(descriptor, path):
                _write_record(descriptor)
                return descriptor
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)  # who held it has removed the file meanwhile


def _take(descriptor: int, path: Path) -> None:
    has_locks = fcntl is not None
    if fcntl is not None:
        try:
            fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in TAKEN:
                raise _taken(path.parent, _read_record(descriptor)) from error
            if error.errno not in NO_LOCKS:
                raise
            has_locks = False
    before = _read_record(descriptor)
    if not before:
        return
    is_here = before.get("host") == socket.gethostname()
    if not has_locks and not (is_here and _has_ended(before.get("pid"))):
        way_out = f"This file system keeps no locks: if that run has ended, delete {path}"
        raise _taken(path.parent, before, way_out)
    if not is_here:
        logger.warning(
            "A run on another host wrote to %s and did not end by itself (%s). Its lock is free, which on a network's "
            "file system may also mean that hosts do not share locks there: make sure that it is not running.",
            *(path.parent, _describe(before)),
        )


def _taken(folder: Path, record: dict[str, Any], way_out: str = "Wait for its end, or stop it") -> FolderTaken:
    return FolderTaken(f"{folder}: a run is writing here ({_describe(record)}). {way_out}, or name another folder.")


def _describe(record: dict[str, Any]) -> str:
    if not record:
        return "started just now"
    return f"pid {record.get('pid')}, host {record.get('host')}, since {record.get('since')}"


def _write_record(descriptor: int) -> None:
    since = f"{datetime.now(UTC):%Y-%m-%d %H:%M:%S} UTC"
    record = {"pid": os.getpid(), "host": socket.gethostname(), "since": since}
    os.ftruncate(descriptor, 0)
    os.pwrite(descriptor, json.dumps(record).encode(), 0)


def _read_record(descriptor: int) -> dict[str, Any]:
    try:
        record = json.loads(os.pread(descriptor, 4096, 0))
    except (ValueError, RecursionError):  # empty, or cut short
        return {}
    return record if isinstance(record, dict) else {}


def _is_at(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False


def _has_ended(pid: Any) -> bool:
    """Whether no process of this host has the number."""
    if not isinstance(pid, int) or pid < 1:
        return True
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    except (OSError, OverflowError):
        return False
    return False
