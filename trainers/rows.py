"""Rows of tokens on their way into the loss."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from accelerate import Accelerator

from retention_gates.kernels.distill_loss import NO_TARGET
from retention_gates.trainers.distributed.sequence_parallel import check_row_length

COLUMNS = ("input_ids", "position_ids", "labels")
PACKING = (
    "texts and chats are tokenised and packed first, with tokenize_documents of retention_gates.data.tokens and "
    "pack_rows of retention_gates.data.packing"
)
SHARES = 1021  # a prime


class RowCollator:
    """Stacks rows of equal length into [B, T] each of input_ids, position_ids and what `next_token_targets` gives.

    Beside them stands `counts`: how many positions KL counts in the batch, and how many the next-token loss.

    A row is full: there is no padding. position_ids start anew at 0 with every document packed into it; labels are the
    row's own tokens, -100 where a token is no target. A row of input_ids alone is one document, all of it targets.

    Args:
        max_length: the most tokens of a row.
        part, parts: a batch is the part-th of so many equal parts [B, T / parts] of the rows.
        longest: with more than 1 there is also `stretch` [B], for each row a factor between 1 and this.

    Raises:
        ValueError: for a row that no loss can be computed from.
    """

    def __init__(self, max_length: int | None, part: int = 0, parts: int = 1, longest: float = 1.0):
        self.max_length, self.part, self.parts, self.longest = max_length, part, parts, longest

    def __call__(self, rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
        rows = [complete_row(row) for row in rows]
        for row in rows:
            self.check(row)
        lengths = sorted({len(row["input_ids"]) for row in rows})
        if len(lengths) > 1:
            raise ValueError(
                f"Rows of {lengths} tokens meet in one batch, which has no padding: pack all to the same length, "
                "as pack_rows of retention_gates.data.packing does."
            )
        ids, positions, labels = (torch.stack([torch.as_tensor(row[name]) for row in rows]) for name in COLUMNS)
        targets, counted = next_token_targets(labels, packed_documents(positions))
        whole = {"input_ids": ids, "position_ids": positions, "targets": targets, "counted": counted}
        batch: dict[str, Any] = {name: x.chunk(self.parts, 1)[self.part].contiguous() for name, x in whole.items()}
        if self.longest > 1:
            batch["stretch"] = self.longest ** row_shares(ids)
        # plain numbers: on a device, reading them would wait for all that was launched before
        batch["counts"] = (int(batch["counted"].sum()), int((batch["targets"] != NO_TARGET).sum()))
        return batch

    def check(self, row: dict[str, Any]) -> None:
        """Raises ValueError unless the row can be trained on."""
        row = complete_row(row)
        lengths = {name: len(row[name]) for name in COLUMNS}
        length = lengths["input_ids"]
        if len(set(lengths.values())) > 1:
            raise ValueError(f"A training row's columns differ in length: {lengths}.")
        if self.max_length is not None and length > self.max_length:
            raise ValueError(
                f"A training row has {length} tokens, the model has {self.max_length} positions "
                "(max_position_embeddings): pack shorter rows."
            )
        check_row_length(length, self.parts)
        documents = packed_documents(torch.as_tensor(row["position_ids"])[None])
        targets, _ = next_token_targets(torch.as_tensor(row["labels"])[None], documents)
        if bool((targets == NO_TARGET).all()):
            raise ValueError(
                f"A training row of {length} tokens has no target: no label other than {NO_TARGET} follows a token of "
                "the same document. Leave such rows out."
            )


def complete_row(row: Mapping[str, Any]) -> dict[str, Any]:
    """The three columns of a row; one that has input_ids alone is one document, all of it targets.

    Raises:
        ValueError: for a row without input_ids, or with padding.
    """
    if "input_ids" not in row:
        raise ValueError(f"A training row has the columns {sorted(map(str, row))}, but no input_ids: {PACKING}.")
    ids = torch.as_tensor(row["input_ids"])
    if ids.ndim != 1 or ids.is_floating_point():
        raise ValueError(f"A training row has input_ids of {ids.dtype} {list(ids.shape)}: give the ids of one row.")
    if "attention_mask" in row and not bool(torch.as_tensor(row["attention_mask"]).all()):
        raise ValueError(f"A training row has padding (zeros in attention_mask), which no row may have: {PACKING}.")
    found = {"input_ids": ids, "position_ids": torch.arange(len(ids)), "labels": ids}
    return {name: torch.as_tensor(row[name]) if name in row else found[name] for name in COLUMNS}


def check_rows(rows: Any, collator: RowCollator) -> None:
    """Raises ValueError unless `rows` is a sequence of rows, the first of which can be trained on."""
    if isinstance(rows, Mapping):
        raise ValueError(f"train_dataset has the splits {', '.join(map(str, rows))}: give one of them.")
    if not hasattr(rows, "__len__") or not hasattr(rows, "__getitem__"):
        raise ValueError(
            f"train_dataset ({type(rows).__name__}) has no row that can be asked for by its number, so that no run "
            f"could be resumed: read what it needs of it; {PACKING}."
        )
    if len(rows) == 0:
        raise ValueError("train_dataset is empty: it needs at least one row.")
    collator.check(rows[0])


def check_eval_rows(rows: Any, ranks: int) -> None:
    """Raises ValueError unless `rows` are token ids [R, T], one row or more for each rank."""
    if not isinstance(rows, torch.Tensor) or rows.ndim != 2 or rows.is_floating_point():
        what = f"a tensor {list(rows.shape)}, {rows.dtype}" if isinstance(rows, torch.Tensor) else type(rows).__name__
        raise ValueError(
            f"eval_dataset is {what}: give token ids [rows, tokens] of documents of one length, such as "
            'torch.tensor(rows["input_ids"]), or sample_windows of retention_gates.data.packing.'
        )
    if len(rows) < ranks:
        raise ValueError(f"eval_dataset has {len(rows)} rows for {ranks} ranks: give each one.")


def row_shares(ids: torch.Tensor) -> torch.Tensor:
    """A number from 0 to 1 for each row of ids [B, T], as if drawn evenly; a row has the same one wherever it is."""
    return (ids.sum(1) % SHARES) / (SHARES - 1)


def packed_documents(position_ids: torch.Tensor) -> torch.Tensor:
    """Index of every token's document in its row [B, T], from positions that start anew with each document."""
    starts = torch.zeros_like(position_ids)
    starts[:, 1:] = position_ids.diff(dim=-1) != 1
    return starts.cumsum(-1)


def next_token_targets(labels: torch.Tensor, documents: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Gives the token that each position has to predict.

    Args:
        labels: [B, T], the row's own tokens or -100.
        documents: [B, T], the index of each token's document.

    Returns:
        targets [B, T]: the label of the next token of the same document, -100 if there is none.
        counted [B, T]: True where the next token is of the same document: a teacher's forecast is worth copying there.
    """
    counted = torch.zeros_like(documents, dtype=torch.bool)
    counted[:, :-1] = documents[:, 1:] == documents[:, :-1]
    targets = labels.roll(-1, dims=-1).masked_fill(~counted, NO_TARGET)
    return targets, counted


def set_shares(batches: Sequence[dict[str, Any]], accelerator: Accelerator) -> None:
    """Gives the batches of one optimiser step their `shares`: by how much their means count in the step's.

    Ranks and passes are averaged with equal weight, but documents end and targets fall where they do.
    """
    totals = [sum(batch["counts"][i] for batch in batches) for i in range(2)]
    passes = len(batches)
    if accelerator.num_processes > 1:
        counted = torch.tensor([*totals, passes], device=accelerator.device)
        *totals, passes = accelerator.reduce(counted, reduction="sum").tolist()
    for batch in batches:
        batch["shares"] = tuple(
            count * passes / max(1, total) for count, total in zip(batch["counts"], totals, strict=True)
        )


def forward_arguments(batch: dict[str, Any]) -> dict[str, Any]:
    """Gives the arguments with which a gated model returns hidden states [B, T, C]."""
    return {
        "input_ids": batch["input_ids"],
        "position_ids": batch["position_ids"],
        "use_cache": False,
        "last_hidden_state_only": True,
    }
