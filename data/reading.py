"""Token documents of one source, read until a budget of tokens is full, with what was wrong on the way counted."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase

from retention_gates.data.files import BadRow
from retention_gates.data.sources import stream_documents
from retention_gates.data.tokens import TokenDocument, tokenize_batch

AT_A_TIME = 64  # documents handed to the tokenizer together
EXAMPLES = 3  # bad rows of which a report says what is wrong


@dataclass
class Reading:
    """The rows that were read of a source, and those that were not."""

    source: str
    documents: int = 0
    tokens: int = 0
    turns: int = 0  # the assistant's turns in chats that are targets
    lost_turns: int = 0  # those that the template does not tell
    bad_rows: int = 0
    examples: list[str] = field(default_factory=list)  # what was wrong with the first bad rows

    def note_bad_row(self, problem: str) -> None:
        self.bad_rows += 1
        if len(self.examples) < EXAMPLES:
            self.examples.append(problem)

    def __str__(self) -> str:
        text = f"{self.source}: {self.documents:,} documents, {self.tokens:,} tokens"
        if self.turns:
            text += f", {self.turns:,} of {self.turns + self.lost_turns:,} assistant turns are targets"
        if self.bad_rows:
            text += f", {self.bad_rows:,} bad rows skipped, the first: {self.examples[0]}"
        return text


def read_tokens(
    source: str,
    tokenizer: PreTrainedTokenizerBase,
    *,
    token_budget: int | None = None,
    skip_bad_rows: bool = False,
    progress: bool = True,
    **options: Any,
) -> tuple[list[TokenDocument], Reading]:
    """Documents of `source` as tokens; the last one may exceed the budget.

    The same seed reads the same documents in the same order, so that a larger budget only adds to a smaller one.

    Args:
        token_budget: tokens after which nothing more is read; None: all of it.
        skip_bad_rows: count rows that cannot be read and go on; otherwise the first one is an error.
        progress: show a bar: of tokens with a budget, else of documents.
        options: of `stream_documents`.

    Raises:
        ValueError: what `stream_documents` and the tokenizer's chat template refuse; nothing that could be read.
    """
    if token_budget is not None and token_budget < 1:
        raise ValueError(f"token_budget={token_budget} tokens; give a number of 1 or more, or None for all of them")
    reading = Reading(source)
    on_bad_row = reading.note_bad_row if skip_bad_rows else None
    found: list[TokenDocument] = []
    unit = "doc" if token_budget is None else "tok"
    with tqdm(total=token_budget, desc=source, unit=unit, unit_scale=True, disable=not progress, delay=1) as bar:
        try:
            for batch in _batches(stream_documents(source, **options, on_bad_row=on_bad_row)):
                for document in tokenize_batch(batch, tokenizer, on_bad_row=on_bad_row):
                    found.append(document)
                    reading.documents += 1
                    reading.tokens += len(document.ids)
                    reading.turns += document.turns
                    reading.lost_turns += document.lost_turns
                    bar.update(1 if token_budget is None else len(document.ids))
                    if token_budget is not None and reading.tokens >= token_budget:
                        return found, reading
                bar.set_postfix(bad_rows=reading.bad_rows, refresh=False)
        except BadRow as error:
            raise BadRow(f"{error}. skip_bad_rows=true counts such rows and goes on.") from error
    if not found:
        raise ValueError(
            f"the data set {source!r} is empty: it has no document with any text ({reading}); choose another"
        )
    return found, reading


def _batches(documents: Iterator[Any]) -> Iterator[list[Any]]:
    while batch := list(islice(documents, AT_A_TIME)):
        yield batch
