"""The common part of all suites: a record of a data set becomes questions with reference answers and a scorer."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from retention_gates.data.files import find_files, looks_local, read_records

Scorer = Callable[[str, Sequence[str]], float]
"""From what the model wrote and the reference answers to a score in 0 to 1."""

Message = dict[str, str]


@dataclass(frozen=True)
class SuiteExample:
    """One question.

    Args:
        task: the suite, and the subset or kind of question within it; scores are averaged by task.
        messages: the chat so far, ending with the user's question.
        references: the right answers.
        max_new_tokens: the longest answer.
        scorer: see `score`.
        answer_prefix: how the answer begins; the model goes on from there.
        stop: the answer ends before the first of these.
    """

    task: str
    messages: tuple[Message, ...]
    references: tuple[str, ...]
    max_new_tokens: int
    scorer: Scorer
    answer_prefix: str = ""
    stop: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not self.references:
            raise ValueError(f"{self.task}: a question has no reference answer to score against; drop it")
        if not self.messages or not any(message["content"].strip() for message in self.messages):
            raise ValueError(f"{self.task}: a question has no text; drop it")
        if self.max_new_tokens < 1:
            raise ValueError(f"{self.task}: max_new_tokens={self.max_new_tokens} must be 1 or more")

    def score(self, answer: str) -> float:
        """The score of an answer in 0 to 1; what stands behind a stop string does not count."""
        ends = [place for stop in self.stop if (place := answer.find(stop)) >= 0]
        return self.scorer(answer[: min(ends, default=len(answer))], self.references)


class Record:
    """A record whose fields are checked as they are read."""

    def __init__(self, suite: str, name: str, columns: Mapping[str, Any]) -> None:
        self.suite, self.name, self.columns = suite, name, columns

    def get(self, field: str, kind: type | tuple[type, ...]) -> Any:
        """The field's value.

        Raises:
            ValueError: it is missing, or of another type.
        """
        if field not in self.columns:
            raise ValueError(
                f"{self.suite}: {self.name} has no field {field!r}; its fields are "
                f"{', '.join(map(str, self.columns))}. Is it a record of another data set?"
            )
        value = self.columns[field]
        if not isinstance(value, kind) or isinstance(value, bool):
            wanted = " or ".join(k.__name__ for k in (kind if isinstance(kind, tuple) else (kind,)))
            raise ValueError(
                f"{self.suite}: field {field!r} of {self.name} is a {type(value).__name__} ({str(value)[:60]!r}) and "
                f"should be {wanted}"
            )
        return value

    def text(self, field: str) -> str:
        """A text that is not blank."""
        value = self.get(field, str)
        if not value.strip():
            raise ValueError(f"{self.suite}: field {field!r} of {self.name} is blank")
        return value

    def texts(self, field: str) -> tuple[str, ...]:
        """A list of texts, or one text, of which at least one is not blank."""
        value = self.get(field, (list, tuple, str))
        values = (value,) if isinstance(value, str) else tuple(value)
        if not all(isinstance(item, str) for item in values) or not any(item.strip() for item in values):
            raise ValueError(f"{self.suite}: field {field!r} of {self.name} holds no answer: {str(value)[:60]!r}")
        return values

    def records(self, field: str) -> list["Record"]:
        """A list of records that is not empty."""
        value = self.get(field, (list, tuple))
        if not value or not all(isinstance(item, Mapping) for item in value):
            raise ValueError(f"{self.suite}: field {field!r} of {self.name} must be a list of objects, one or more")
        return [Record(self.suite, f"{self.name}, {field}[{i}]", item) for i, item in enumerate(value)]


@dataclass(frozen=True)
class Suite:
    """A suite of questions on the Hub.

    Args:
        subsets: configurations of the data set; `load` takes the first if none is named.
        read: from a record and its subset to its questions; none, if it has only such as can't be scored here.
        files: for a data set of bare JSON files, the path within it of each subset.
        hub_name: None for a data set that is not on the Hub but at `home`.
        convert: from the records of a local file, its folder and the subset to records in the Hub's form.
    """

    name: str
    hub_name: str | None
    subsets: tuple[str, ...]
    split: str
    read: Callable[[Record, str], list[SuiteExample]]
    files: Mapping[str, str] | None = None
    home: str | None = None
    convert: Callable[[Iterator[Record], Path, str], Iterator[Record]] | None = None

    def load(
        self, subset: str | None = None, *, source: str | None = None, limit: int | None = None
    ) -> list[SuiteExample]:
        """The questions of a subset, or of the first `limit` records of it.

        Args:
            source: a .jsonl, .json (both also as .gz) or .parquet file with records in the data set's form, instead
                of the Hub.

        Raises:
            ValueError: an unknown subset, a source that is not there, or a record of another form.
        """
        subset = self.subsets[0] if subset is None else subset
        if subset not in self.subsets:
            raise ValueError(f"{self.name} has no subset {subset!r}; choose {', '.join(self.subsets)}")
        if limit is not None and limit < 1:
            raise ValueError(f"limit={limit} records; give 1 or more, or None for all of them")
        records = islice(self._local(source, subset) if source is not None else self._hub(subset), limit)
        examples = [example for record in records for example in self.read(record, subset)]
        if not examples:
            raise ValueError(f"{self.name}: there is no question in {source or self.hub_name}")
        return examples

    def _local(self, source: str, subset: str) -> Iterator[Record]:
        if not looks_local(source):
            instead = f"leave source out to load {self.hub_name}" if self.hub_name else f"it is at {self.home}"
            raise ValueError(f"{self.name}: there is no file {source!r}; {instead}")
        root, files = find_files(source)
        records = (Record(self.name, row.name, row.columns) for row in read_records(root, files))
        yield from records if self.convert is None else self.convert(records, files[0].parent, subset)

    def _hub(self, subset: str) -> Iterator[Record]:
        if self.hub_name is None:
            raise ValueError(
                f"{self.name} is not on the Hub: download it from {self.home}, and name the file: "
                f"--suites {self.name}/{subset}=FILE"
            )
        import datasets  # 1-2 s to import

        try:
            if self.files is not None:
                path = f"hf://datasets/{self.hub_name}/{self.files[subset]}"
                rows = datasets.load_dataset("json", data_files=path, split="train")
            else:
                rows = datasets.load_dataset(self.hub_name, subset, split=self.split)
        except (datasets.exceptions.DatasetNotFoundError, ConnectionError, FileNotFoundError) as error:
            raise ValueError(
                f"{self.name}: the Hub data set {self.hub_name!r} could not be loaded ({error}); check the network, "
                "or give a local copy as source"
            ) from error
        for index, columns in enumerate(rows):
            yield Record(self.name, f"{self.hub_name}/{subset}:{index}", columns)
