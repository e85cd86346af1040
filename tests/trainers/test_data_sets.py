"""Data sets of Hugging Face as training rows: ids as they are, texts with one word on how to pack them."""

from pathlib import Path

import pytest
import torch
from tiny_training import Rows, arguments, gated, trainer_of

from retention_gates.trainers.rows import RowCollator
from retention_gates.trainers.trainer import RetentionTrainer

datasets = pytest.importorskip("datasets", reason="GPU tests also run where it is not installed")

ONE_DOCUMENT = Rows(positions=torch.arange(24))


def as_data_set(rows: Rows, *columns: str, **more):
    return datasets.Dataset.from_list([{name: rows[i][name].tolist() for name in columns} | more for i in range(16)])


def losses(folder: Path, rows) -> list[float]:
    trainer = trainer_of(folder, rows=rows, max_steps=3, save_strategy="no")
    trainer.train()
    return [line["loss"] for line in trainer.state.log_history if "loss" in line]


def test_input_ids_alone_are_documents_and_targets(tmp_path: Path):
    expected = losses(tmp_path / "own", [ONE_DOCUMENT[i] for i in range(16)])
    assert losses(tmp_path / "ids", as_data_set(ONE_DOCUMENT, "input_ids")) == expected
    tokenised = as_data_set(ONE_DOCUMENT, "input_ids", text="a", attention_mask=[1] * 24).with_format("torch")
    assert losses(tmp_path / "tokenised", tokenised) == expected


def test_columns_that_are_given_count():
    labels = torch.full((48,), -100)
    labels[40:] = 7
    row = {"input_ids": list(range(48)), "labels": labels.tolist()}
    batch = RowCollator(None)([row])
    assert batch["counts"] == (47, 8) and batch["position_ids"][0].tolist() == list(range(48))
    packed = RowCollator(None)([{"input_ids": list(range(48)), "position_ids": Rows()[0]["position_ids"].tolist()}])
    assert packed["counts"] == (46, 46)


@pytest.mark.parametrize("column", ["text", "messages"])
def test_one_word_on_texts(tmp_path: Path, column: str):
    rows = datasets.Dataset.from_list([{column: "the river"}] * 4)
    with pytest.raises(
        ValueError, match=rf"the columns \['{column}'\], but no input_ids: .*tokenize_documents.*pack_rows"
    ):
        RetentionTrainer(gated(), arguments(tmp_path), rows)
    assert not (tmp_path / "out").exists()


def test_evaluation_rows_are_a_tensor_of_ids(tmp_path: Path):
    rows = as_data_set(ONE_DOCUMENT, "input_ids")
    for given, message in (
        (rows, "eval_dataset is Dataset: give token ids"),
        (torch.ones(3, 9), "a tensor .3, 9., tor"),
    ):
        with pytest.raises(ValueError, match=message):
            trainer_of(tmp_path, rows=rows, eval_rows=given)
    trainer = trainer_of(tmp_path, rows=rows, eval_rows=torch.tensor(rows["input_ids"][:2]))
    assert "eval_kl_8" in trainer.evaluate()
    with pytest.raises(ValueError, match=r"input_ids\"\]"):
        trainer.evaluate(rows)


def test_what_is_no_sequence_of_full_rows_is_refused(tmp_path: Path):
    rows = as_data_set(ONE_DOCUMENT, "input_ids")
    padded = as_data_set(ONE_DOCUMENT, "input_ids", attention_mask=[1] * 20 + [0] * 4)
    for given, message in (
        (datasets.DatasetDict({"train": rows, "test": rows}), "has the splits train, test: give one"),
        (rows.to_iterable_dataset(), "\\(IterableDataset\\) has no row that can be asked for"),
        (padded, "has padding .*pack_rows"),
    ):
        with pytest.raises(ValueError, match=message):
            RetentionTrainer(gated(), arguments(tmp_path), given)
    with pytest.raises(ValueError, match=r"Rows of \[5, 9\] tokens meet in one batch.*pack_rows"):
        RowCollator(None)([{"input_ids": list(range(5))}, {"input_ids": list(range(9))}])
