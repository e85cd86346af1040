"""Reads the records of local files: JSON lines, JSON, Parquet and plain text."""

import glob
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow.parquet  # type: ignore[import-untyped]

TABLE_SUFFIXES = (".jsonl", ".json", ".parquet")
TEXT_SUFFIXES = (".txt", ".md")
SUFFIXES = TABLE_SUFFIXES + TEXT_SUFFIXES

OnBadRow = Callable[[str], None]
Record = tuple[str, dict[str, Any]]
"""The name of a record, unique in its source, and its columns."""


def looks_local(source: str) -> bool:
    """Whether `source` means a path or a glob rather than the name of a data set."""
    path = Path(source).expanduser()
    return (
        path.exists() or path.suffix in SUFFIXES or source.startswith((".", "~", "/")) or glob.has_magic(str(source))
    )


def find_files(source: str) -> tuple[Path, list[Path]]:
    """The folder that names are relative to, and the sorted files of a file, folder (searched in depth) or glob.

    Raises:
        ValueError: nothing is there, a file's form is unknown, or a folder holds both tables and texts.
    """
    path = Path(source).expanduser()
    if path.is_dir():
        root = path
        files = sorted(file for file in path.rglob("*") if file.suffix in SUFFIXES and file.is_file())
    elif path.is_file():
        root, files = path.parent, [path]
    elif glob.has_magic(str(path)):
        files = sorted(Path(name) for name in glob.glob(str(path), recursive=True) if Path(name).is_file())
        fixed = list(path.parts[: next(i for i, p in enumerate(path.parts) if glob.has_magic(p))])
        root = Path(*fixed) if fixed else Path(".")
    else:
        raise ValueError(
            f"there is no file or folder {source!r}; give an existing path, a glob, or a Hub data set name"
        )
    if not files:
        raise ValueError(f"{source!r} holds no file that can be read; allowed are {', '.join(SUFFIXES)}")
    unknown = [file for file in files if file.suffix not in SUFFIXES]
    if unknown:
        raise ValueError(
            f"{str(unknown[0])!r} has an unknown form {unknown[0].suffix!r}; allowed: {', '.join(SUFFIXES)}"
        )
    if len({file.suffix in TABLE_SUFFIXES for file in files}) == 2:
        raise ValueError(
            f"{source!r} holds both tables ({', '.join(TABLE_SUFFIXES)}) and texts ({', '.join(TEXT_SUFFIXES)}); "
            f"say which by a glob such as {str(root / '**' / ('*' + files[0].suffix))!r}"
        )
    return root, files


def read_records(root: Path, files: list[Path], *, on_bad_row: OnBadRow | None = None) -> Iterator[Record]:
    """Records of the files in order; a text file is one record whose only column is `text`.

    Args:
        on_bad_row: gets what is wrong with a line of JSON lines that is none, which is then skipped. None: an error.
    """
    for file in files:
        name = file.relative_to(root).as_posix()
        if file.suffix in TEXT_SUFFIXES:
            yield file.relative_to(root).with_suffix("").as_posix(), {"text": _read_text(file)}
        else:
            rows = _parquet_rows(file) if file.suffix == ".parquet" else _json_rows(file, on_bad_row)
            for index, row in enumerate(rows):
                yield f"{name}:{index}", row


def _read_text(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{str(file)!r} is not UTF-8 text ({error}); convert it first") from error


def _parquet_rows(file: Path) -> Iterator[dict[str, Any]]:
    try:
        table = pyarrow.parquet.ParquetFile(file)
    except pyarrow.ArrowInvalid as error:
        raise ValueError(f"{str(file)!r} is not a Parquet file: {error}") from error
    for batch in table.iter_batches(batch_size=1024):
        yield from batch.to_pylist()


def _json_rows(file: Path, on_bad_row: OnBadRow | None) -> Iterator[dict[str, Any]]:
    """Rows of JSON lines, or of one JSON list (a `.json` file that starts with a bracket)."""
    with file.open(encoding="utf-8") as lines:
        is_list = file.suffix == ".json" and lines.read(1) == "["
        lines.seek(0)
        if is_list:
            rows: Iterator[tuple[int, Any]] = enumerate(_parse(lines.read(), file, 1), start=1)
        else:
            rows = ((i, line) for i, line in enumerate(lines, start=1) if line.strip())
        for number, row in rows:
            try:
                row = row if is_list else _parse(row, file, number)
                if not isinstance(row, dict):
                    raise ValueError(
                        f"{'entry' if is_list else 'line'} {number} of {str(file)!r} is a {type(row).__name__}; each "
                        'must be an object such as {"text": "..."} or {"messages": [...]}'
                    )
            except ValueError as error:
                if on_bad_row is None:
                    raise
                on_bad_row(str(error))
                continue
            yield row


def _parse(text: str, file: Path, line: int) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{str(file)!r} is not valid JSON at line {line + error.lineno - 1}: {error.msg}") from error
