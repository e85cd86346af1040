"""Reads the records of local files: JSON lines, JSON, Parquet and plain text."""

import glob
import gzip
import json
import re
import zlib
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow.parquet  # type: ignore[import-untyped]

TABLE_SUFFIXES = (".jsonl", ".json", ".parquet", ".jsonl.gz", ".json.gz")
TEXT_SUFFIXES = (".txt", ".md")
SUFFIXES = TABLE_SUFFIXES + TEXT_SUFFIXES

BYTE_ORDER_MARK = "\ufeff"
JSON_TOKEN = re.compile(r'"[^"\\]*(?:\\.[^"\\]*)*"|[\[\]{},]', re.DOTALL)  # strings, brackets and commas

OnBadRow = Callable[[str], None]
Row = tuple[str, Callable[[], Any]]
"""Where a row is, and a function that gives it or raises BadRow."""


class BadRow(ValueError):
    """A row that cannot be read; the message says where it is, and why."""


class Record(NamedTuple):
    """A row of a table, or a text file."""

    name: str  # unique in its source
    columns: dict[str, Any]
    place: str  # for messages: file and line


def looks_local(source: str) -> bool:
    """Whether `source` means a path or a glob rather than the name of a data set."""
    path = Path(source).expanduser()
    return (
        path.exists() or _suffix(path) in SUFFIXES or source.startswith((".", "~", "/")) or glob.has_magic(str(source))
    )


def find_files(source: str) -> tuple[Path, list[Path]]:
    """The folder that names are relative to, and the sorted files of a file, folder (searched in depth) or glob.

    Raises:
        ValueError: nothing is there, a file's form is unknown, or a folder holds both tables and texts.
    """
    path = Path(source).expanduser()
    if path.is_dir():
        root = path
        files = sorted(file for file in path.rglob("*") if _suffix(file) in SUFFIXES and file.is_file())
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
    unknown = [file for file in files if _suffix(file) not in SUFFIXES]
    if unknown:
        raise ValueError(
            f"{str(unknown[0])!r} has an unknown form {_suffix(unknown[0])!r}; allowed: {', '.join(SUFFIXES)}"
        )
    if len({_suffix(file) in TABLE_SUFFIXES for file in files}) == 2:
        raise ValueError(
            f"{source!r} holds both tables ({', '.join(TABLE_SUFFIXES)}) and texts ({', '.join(TEXT_SUFFIXES)}); "
            f"say which by a glob such as {str(root / '**' / ('*' + _suffix(files[0])))!r}"
        )
    return root, files


def read_records(root: Path, files: list[Path], *, on_bad_row: OnBadRow | None = None) -> Iterator[Record]:
    """Records of the files in order; a text file is one record whose only column is `text`.

    Args:
        on_bad_row: gets what is wrong with a row that cannot be read, which is then skipped. None: an error.

    Raises:
        BadRow: a row that cannot be read.
        ValueError: a file of which no further row can be read.
    """
    for file in files:
        name = file.relative_to(root).as_posix()
        index = 0
        for place, read in _rows(file):
            try:
                columns = read()
                if not isinstance(columns, dict):
                    raise BadRow(
                        f"{place} is a {type(columns).__name__}; each must be an object such as "
                        '{"text": "..."} or {"messages": [...]}'
                    )
            except BadRow as error:
                if on_bad_row is None:
                    raise
                on_bad_row(str(error))
                continue
            if file.suffix in TEXT_SUFFIXES:
                yield Record(file.relative_to(root).with_suffix("").as_posix(), columns, place)
            else:
                yield Record(f"{name}:{index}", columns, place)
            index += 1


def check_text(text: str, place: str) -> None:
    """Refuses a string that no tokenizer takes: one with halves of characters (lone surrogates).

    Raises:
        BadRow: naming the first of them.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise BadRow(
            f"{place} holds a lone surrogate, U+{ord(text[error.start]):04X} at character {error.start + 1:,}: half "
            "of a character, which no text can have; repair it, or leave it out"
        ) from None


def _suffix(file: Path) -> str:
    """The end of a file's name; that of a compressed file has two parts."""
    return Path(file.stem).suffix + file.suffix if file.suffix == ".gz" else file.suffix


def _rows(file: Path) -> Iterator[Row]:
    if file.suffix in TEXT_SUFFIXES:
        yield repr(str(file)), partial(_read_text, file)
    elif file.suffix == ".parquet":
        yield from _parquet_rows(file)
    else:
        yield from _json_rows(file)


def _read_text(file: Path) -> dict[str, str]:
    try:
        return {"text": file.read_text(encoding="utf-8-sig")}
    except UnicodeDecodeError as error:
        raise BadRow(f"{str(file)!r} is not UTF-8 text ({error}); convert it first") from error


def _parquet_rows(file: Path) -> Iterator[Row]:
    number = 0
    try:
        table = pyarrow.parquet.ParquetFile(file)
    except (pyarrow.ArrowException, OSError) as error:
        raise ValueError(f"{str(file)!r} is not a Parquet file: {error}") from error
    try:
        for batch in table.iter_batches(batch_size=1024):
            try:
                rows = batch.to_pylist()
            except ValueError:  # the fault of some rows, each to be read alone
                rows = None
            for i in range(batch.num_rows):
                number += 1
                place = f"row {number:,} of {str(file)!r}"
                read = partial(_parquet_row, batch.slice(i, 1), place) if rows is None else partial(_same, rows[i])
                yield place, read
    except (pyarrow.ArrowException, OSError) as error:
        raise ValueError(f"{str(file)!r} is damaged behind row {number:,}: {error}") from error


def _parquet_row(batch: pyarrow.RecordBatch, place: str) -> dict[str, Any]:
    try:
        (row,) = batch.to_pylist()
    except ValueError as error:  # strings are decoded only now
        raise BadRow(f"{place} cannot be read: {error}") from error
    return dict(row)


def _json_rows(file: Path) -> Iterator[Row]:
    """Rows of JSON lines, or of one JSON list (a `.json` file that starts with a bracket).

    Bytes that are not UTF-8 are read as lone surrogates, so that only their row is lost.
    """
    opened = gzip.open if file.suffix == ".gz" else open
    number, may_be_list = 0, _suffix(file).startswith(".json") and not _suffix(file).startswith(".jsonl")
    try:
        with opened(file, "rt", encoding="utf-8-sig", errors="surrogateescape") as lines:
            is_list = may_be_list and next((line.lstrip() for line in lines if line.strip()), "")[:1] == "["
            lines.seek(0)
            if is_list:
                yield from _list_entries(lines.read(), file)
                return
            for number, line in enumerate(lines, start=1):
                text = line.removeprefix(BYTE_ORDER_MARK)  # one stands inside where files were laid end to end
                if text.strip():
                    yield f"line {number} of {str(file)!r}", partial(_parse, text, file, f"at line {number}")
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise ValueError(f"{str(file)!r} is damaged behind line {number}: {error}") from error


def _list_entries(text: str, file: Path) -> Iterator[Row]:
    try:
        text.encode()
        entries = json.loads(text)
    except (ValueError, RecursionError):  # the fault of some entries, each to be parsed alone
        for number, (line, entry) in enumerate(_split_list(text, file), start=1):
            place = f"entry {number}, line {line},"
            yield f"{place} of {str(file)!r}", partial(_parse, entry, file, f"in {place[:-1]}")
    else:
        for number, entry in enumerate(entries, start=1):
            yield f"entry {number} of {str(file)!r}", partial(_same, entry)


def _same(entry: Any) -> Any:
    return entry


def _split_list(text: str, file: Path) -> Iterator[tuple[int, str]]:
    """The line and the text of each entry of a JSON list."""
    depth = start = 0
    line = 1
    for token in JSON_TOKEN.finditer(text):
        mark = token[0]
        if mark in ("[", "{"):
            depth += 1
            if depth == 1:
                start = token.end()
                line += text.count("\n", 0, start)
        elif mark in ("]", "}"):
            depth -= 1
        if (mark == "," and depth == 1) or depth == 0:
            entry = text[start : token.start()]
            begins = len(entry) - len(entry.lstrip())
            yield line + text.count("\n", start, start + begins), entry
            line += text.count("\n", start, token.end())
            start = token.end()
        if depth == 0:
            break
    if depth or text[start:].strip():
        what = "its list has no end" if depth else "there is more behind its list"
        raise ValueError(f"{str(file)!r} is not valid JSON at line {line}: {what}")


def _parse(text: str, file: Path, where: str) -> Any:
    try:
        text.encode("utf-8", "surrogateescape").decode("utf-8")
        return json.loads(text)
    except UnicodeDecodeError as error:
        raise BadRow(f"{str(file)!r} is not UTF-8 text {where} ({error}); convert it first") from error
    except RecursionError:
        raise BadRow(f"{str(file)!r} is not valid JSON {where}: it is nested too deep") from None
    except json.JSONDecodeError as error:
        raise BadRow(f"{str(file)!r} is not valid JSON {where}: {error.msg}") from error
    except ValueError as error:  # a number of thousands of digits
        raise BadRow(f"{str(file)!r} cannot be read {where}: {error}") from error
