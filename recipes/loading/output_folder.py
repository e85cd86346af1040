"""Where commands write: never over what isn't ours, never half a file."""

import os
import shutil
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from retention_gates.trainers.run_folder.writing_alone import writing_alone

MARKER = ".retention-gates"

_held: dict[Path, ExitStack] = {}  # the folders of the command that runs


def check_output(folder: str | Path) -> Path:
    """The folder, if a command may write there: it does not exist, is empty, or was written by one of our commands.

    One that exists is held from now on, so that no other command writes there until this one has ended.

    Raises:
        ValueError: if it is a file, holds something that isn't ours, or another command is writing there.
    """
    folder = Path(folder)
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{folder} is a file: name a folder to write to.")
    if folder.is_dir() and not _is_ours(folder):
        raise ValueError(
            f"The folder {folder} exists and was not written by retention-gates: name another one, or empty it first."
        )
    if (folder / MARKER).is_file():
        hold(folder)
    return folder


def claim_output(folder: str | Path) -> Path:
    """As `check_output`; then makes the folder, marks it as ours, and holds it."""
    folder = check_output(folder)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / MARKER).touch()
    hold(folder)
    return folder


def hold(folder: Path) -> None:
    """Keeps other commands from writing to an existing folder until this one ends.

    Raises:
        ValueError: if another one is writing there.
    """
    path = folder.resolve()
    if path not in _held:
        with ExitStack() as stack:
            stack.enter_context(writing_alone(path))
            _held[path] = stack.pop_all()


def release_outputs() -> None:
    """Lets other commands write where this one did."""
    while _held:
        _held.popitem()[1].close()


@contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """Gives a temporary name beside `path` to write to, and renames it to `path` when the block ends without error."""
    path = Path(path)
    temporary = path.with_name(f".{path.stem}.{os.getpid()}{path.suffix}")  # the suffix tells matplotlib the format
    try:
        yield temporary
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: str | Path, text: str) -> None:
    """Writes a whole text file or, if the disk is full, leaves what was there."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def copy_file(source: str | Path, target: str | Path) -> None:
    with replacing(target) as temporary:
        shutil.copyfile(source, temporary)


def _is_ours(folder: Path) -> bool:
    # a folder that only holds folders of ours is what a run with several commands leaves
    return (folder / MARKER).is_file() or all(entry.is_dir() and _is_ours(entry) for entry in folder.iterdir())
