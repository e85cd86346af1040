"""GGUF weights as an ordinary folder: converted once, kept beside their file, and checked by its hash."""

import errno
import hashlib
import json
import os
import shutil
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

from huggingface_hub import constants
from huggingface_hub.utils import WeakFileLock
from safetensors import SafetensorError
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from retention_gates.recipes.loading.output_folder import write_text

FORM = 1  # of what is kept; another number converts anew
SOURCE = "gguf_source.json"
LOOKED_AFTER = ("site-packages", "dist-packages", "snapshots", "blobs")  # folders of pip's and of the Hub's cache
SPARE_BYTES = 64 * 2**20  # for the tokenizer and the rest


@dataclass(frozen=True)
class Source:
    """The GGUF file that a kept folder was made of."""

    form: int
    # bytes, ns of the last change of content and of entry, inode: a file in which none differs was not touched
    stat: list[int]
    sha256: str


class _CannotKeep(Exception):
    """The disk takes no more, or may not be written to."""


def find_kept(path: str | Path, dtypes: tuple[str, ...]) -> Path | None:
    """The folder with the weights of a GGUF file in one of these types, if one is kept and of the file as it is.

    A file that was not touched is taken for the same; of any other the hash decides.
    """
    path = Path(path)
    for dtype in dtypes:
        for folder in _places(path, dtype):
            if _is_of(folder, path):
                return folder
    return None


def keep(
    path: str | Path, dtype: str, load: Callable[[], tuple[PreTrainedModel, PreTrainedTokenizerBase | None]]
) -> Path | None:
    """The folder with a GGUF file's weights in this type; it is written first, of what `load` gives, if there is none.

    It lies beside the file and is called FILE.DTYPE. Where that folder cannot be written to, and for files that pip or
    the Hub's cache looks after, it lies in the Hub's folder for what other libraries keep (HF_ASSETS_CACHE). Of
    processes that start together one converts, and the others wait.

    Returns:
        None, with a warning, where it cannot be written.

    Raises:
        ValueError: if the file changes meanwhile.
    """
    path = Path(path)
    beside, cached = _places(path, dtype)
    is_ours = not set(LOOKED_AFTER) & set(path.absolute().parts) and os.access(path.parent, os.W_OK)
    folder = beside if is_ours else cached
    try:
        with _writing():
            folder.parent.mkdir(parents=True, exist_ok=True)
            lock = WeakFileLock(folder.with_name(f".{folder.name}.lock"))
            lock.__enter__()
        try:
            return find_kept(path, (dtype,)) or _convert(path, folder, load)
        finally:
            lock.__exit__(None, None, None)
    except _CannotKeep as error:
        warnings.warn(
            f"The weights of {path} cannot be kept in {folder} ({error}), and every start will convert them again: "
            "free space there, or set HF_ASSETS_CACHE to a folder that can be written to.",
            stacklevel=2,
        )
        return None


def _convert(
    path: Path, folder: Path, load: Callable[[], tuple[PreTrainedModel, PreTrainedTokenizerBase | None]]
) -> Path:
    temporary = folder.with_name(f".{folder.name}.part")
    shutil.rmtree(temporary, ignore_errors=True)  # of a run that was killed
    print(f"{path} is converted once; from now on its weights are loaded from {folder}.", file=sys.stderr)
    before = _stat(path)
    source = Source(FORM, before, _hash(path))
    model, tokenizer = load()
    if _stat(path) != before:
        raise ValueError(f"{path} changed while it was read: start again when it is whole.")
    try:
        with _writing():
            needed = model.get_memory_footprint() + SPARE_BYTES
            if shutil.disk_usage(folder.parent).free < needed:
                raise OSError(errno.ENOSPC, f"{needed / 1e9:.1f} GB are needed")
            temporary.mkdir()
            model.save_pretrained(temporary)
            if tokenizer is not None:
                tokenizer.save_pretrained(temporary)
            _note(temporary, source)
            shutil.rmtree(folder, ignore_errors=True)  # of another state of the file
            temporary.rename(folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return folder


def _places(path: Path, dtype: str) -> tuple[Path, Path]:
    """Where the weights may be kept: beside the file, or in the Hub's folder of assets."""
    name = f"{path.name}.{dtype}"
    digits = hashlib.sha256(os.fsencode(path.absolute())).hexdigest()[:16]
    return path.with_name(name), Path(constants.HF_ASSETS_CACHE) / "retention_gates" / "gguf" / digits / name


def _is_of(folder: Path, path: Path) -> bool:
    """Whether a folder was made of the file, by this version's rules."""
    try:
        source = Source(**json.loads((folder / SOURCE).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):  # none, or not by us
        return False
    if source.form != FORM:
        return False
    now = _stat(path)
    if source.stat == now:
        return True
    if source.sha256 != _hash(path):
        return False
    if os.access(folder, os.W_OK):
        _note(folder, Source(FORM, now, source.sha256))
    return True


def _note(folder: Path, source: Source) -> None:
    write_text(folder / SOURCE, json.dumps(asdict(source)) + "\n")


def _stat(path: Path) -> list[int]:
    found = path.stat()
    return [found.st_size, found.st_mtime_ns, found.st_ctime_ns, found.st_ino]


def _hash(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextmanager
def _writing() -> Iterator[None]:
    try:
        yield
    except (OSError, SafetensorError) as error:  # a full disk is either
        raise _CannotKeep(str(error)) from error
