"""Packs token documents into full rows of one length, each document at positions of its own."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.utils.data import Dataset

from retention_gates.data.document_facts import document_facts
from retention_gates.data.tokens import TokenDocument

NO_TARGET = -100

Row = dict[str, torch.Tensor]
"""`input_ids`, `position_ids` (from 0 at each document) and `labels` (the tokens, or -100), each int64 [T]."""


class Piece(NamedTuple):
    """Tokens `start` to `stop` of one document."""

    document: int
    start: int
    stop: int


class PackedRows(Dataset[Row]):
    """Rows of exactly `row_length` tokens cut from the documents laid end to end; there is no padding.

    A document that doesn't fit goes on in the next row, as a piece that starts at position 0 again, behind
    `prefix_ids`. Labels follow the Hugging Face convention: the label at index t is the token at t, and the loss
    shifts. The first token of a piece has nothing before it and is no target, nor are the tokens of a chat that others
    than the assistant wrote. What is left after the last full row is dropped (`dropped_tokens`), and so are rows
    without a target (`rows_without_target`), such as those inside a user's very long message.

    Args:
        prefix_ids: tokens that open a piece from inside a document; see `document_prefix`.
        order: order of the documents, as given if None.
        first_cut: the first document starts here; the tokens before form a piece at the very end.

    Raises:
        ValueError: no documents, or a row length below 2 or beyond all tokens.
    """

    def __init__(
        self,
        documents: Sequence[TokenDocument],
        row_length: int,
        *,
        prefix_ids: Sequence[int] = (),
        order: Sequence[int] | None = None,
        first_cut: int = 0,
    ) -> None:
        check_row_length(row_length, prefix_ids)
        if not documents:
            raise ValueError("there are no documents to pack: the data set is empty")
        self.documents, self.row_length = documents, row_length
        self.prefix = np.array(prefix_ids, dtype=np.int64)
        rows, self.dropped_tokens = self._cut(range(len(documents)) if order is None else order, first_cut)
        if not rows:
            raise ValueError(
                f"row_length={row_length} tokens is longer than all documents together, {self.dropped_tokens} tokens; "
                "choose shorter rows or add documents"
            )
        kept = [row for row in rows if any(self._has_target(piece) for piece in row)]
        self.rows_without_target = len(rows) - len(kept)
        # Arrays, because a list of tuples takes ten times the memory, and every epoch of a training run keeps its own.
        self._pieces = np.array([piece for row in kept for piece in row], dtype=np.int64).reshape(-1, 3)
        self._starts = np.cumsum([0, *map(len, kept)])  # [rows + 1]

    def __len__(self) -> int:
        return len(self._starts) - 1

    def document_facts(self) -> dict[str, Any]:
        return document_facts(self.documents)

    def pieces(self, index: int) -> list[Piece]:
        """The pieces that make up row `index`."""
        return [Piece(*piece) for piece in self._pieces[self._starts[index] : self._starts[index + 1]].tolist()]

    def __getitem__(self, index: int) -> Row:
        if not 0 <= index < len(self):
            raise IndexError(f"row {index} of {len(self)}")
        ids, positions, labels = [], [], []
        for piece in self.pieces(index):
            document, opening = self.documents[piece.document], self.prefix if piece.start else self.prefix[:0]
            tokens = np.concatenate([opening, document.ids[piece.start : piece.stop]])
            is_target = np.ones(len(tokens), dtype=bool)
            is_target[: max(1, len(opening))] = False
            if document.targets is not None:
                is_target[len(opening) :] &= document.targets[piece.start : piece.stop]
            ids.append(tokens)
            positions.append(np.arange(len(tokens)))
            labels.append(np.where(is_target, tokens, NO_TARGET))
        return {
            name: torch.from_numpy(np.concatenate(parts).astype(np.int64))
            for name, parts in (("input_ids", ids), ("position_ids", positions), ("labels", labels))
        }

    def _cut(self, order: Sequence[int], first_cut: int) -> tuple[list[list[Piece]], int]:
        """The full rows, and the number of tokens left over."""
        spans = [Piece(index, 0, len(self.documents[index].ids)) for index in order]
        if first_cut:
            first = spans[0]
            assert 0 < first_cut < first.stop
            spans = [first._replace(start=first_cut), *spans[1:], first._replace(stop=first_cut)]
        rows: list[list[Piece]] = []
        row: list[Piece] = []
        room = self.row_length
        for document, start, stop in spans:
            while start < stop:
                opening = len(self.prefix) if start else 0
                take = min(stop - start, room - opening)
                row.append(Piece(document, start, start + take))
                start += take
                room -= opening + take
                if room == 0:
                    rows.append(row)
                    row, room = [], self.row_length
        return rows, sum(piece.stop - piece.start for piece in row)

    def _has_target(self, piece: Piece) -> bool:
        targets = self.documents[piece.document].targets
        first = piece.start + (0 if piece.start and len(self.prefix) else 1)
        return first < piece.stop and (targets is None or bool(targets[first : piece.stop].any()))


def pack_rows(documents: Sequence[TokenDocument], row_length: int, *, prefix_ids: Sequence[int] = ()) -> PackedRows:
    """The documents in order as full rows; see `PackedRows`.

    Raises:
        ValueError: what `PackedRows` refuses, or no row has a target.
    """
    rows = PackedRows(documents, row_length, prefix_ids=prefix_ids)
    check_targets(rows)
    return rows


def check_targets(rows: PackedRows) -> None:
    """Refuses data in which no row has a target."""
    if not len(rows):
        raise ValueError(
            f"none of the {rows.rows_without_target} rows of {rows.row_length} tokens has a target: they hold no "
            "assistant turn and no text of two or more tokens; choose longer rows or other data"
        )


def collate(rows: Sequence[Mapping[str, torch.Tensor]]) -> Row:
    """A batch of rows of one length: each tensor `[B, T]`."""
    return {name: torch.stack([row[name] for row in rows]) for name in rows[0]}


def sample_windows(
    documents: Sequence[TokenDocument], row_length: int, count: int, *, seed: int, prefix_ids: Sequence[int] = ()
) -> torch.Tensor:
    """Windows of single documents for evaluation, int64 `[count, row_length]`: no two overlap, works take turns.

    A window from inside a document begins with `prefix_ids`. The same seed gives the same windows. Documents that
    repeat the text of another one are left out.
    """
    check_row_length(row_length, prefix_ids)
    rng = np.random.default_rng(seed)
    payload = row_length - len(prefix_ids)
    by_work: dict[str, list[np.ndarray]] = {}
    for document in documents:
        if document.is_repeat:
            continue
        body = document.ids[len(prefix_ids) :] if _starts_with(document.ids, prefix_ids) else document.ids
        windows, spare = divmod(len(body), payload)
        phase = int(rng.integers(spare + 1))
        cut = [body[phase + i * payload : phase + (i + 1) * payload] for i in range(windows)]
        by_work.setdefault(document.work, []).extend(cut)
    available = sum(map(len, by_work.values()))
    if not 1 <= count <= available:
        raise ValueError(
            f"count={count} windows of {row_length} tokens; these documents have {available} that don't overlap: "
            "ask for 1 to that many, for shorter rows, or add documents"
        )
    queues = [[windows[i] for i in rng.permutation(len(windows))] for windows in by_work.values()]
    queues = [queues[i] for i in rng.permutation(len(queues))]
    chosen: list[np.ndarray] = []
    while len(chosen) < count:
        chosen += [queue.pop() for queue in queues if queue]
    prefix = np.array(prefix_ids, dtype=np.int64)
    return torch.from_numpy(np.stack([np.concatenate([prefix, window]) for window in chosen[:count]]).astype(np.int64))


def check_row_length(row_length: int, prefix_ids: Sequence[int]) -> None:
    """Refuses rows too short to hold the opening tokens and a target."""
    shortest = len(prefix_ids) + 1 if prefix_ids else 2
    if row_length < shortest:
        raise ValueError(
            f"row_length={row_length} tokens; a row needs {shortest} or more to have a target, and usually 512 or more"
        )


def _starts_with(ids: np.ndarray, prefix_ids: Sequence[int]) -> bool:
    return len(prefix_ids) > 0 and ids[: len(prefix_ids)].tolist() == list(prefix_ids)
