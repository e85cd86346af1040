import pickle
import random

import numpy as np
import pytest
import torch

from retention_gates.data.mixture import TrainingRows
from retention_gates.data.packing import NO_TARGET
from retention_gates.data.tokens import TokenDocument

TASKS = ["passage_repeat", "passkey"]


def same(one: dict, other: dict) -> bool:
    return all(torch.equal(one[name], other[name]) for name in ("input_ids", "position_ids", "labels"))


def test_a_row_depends_on_seed_and_index_alone(token_documents, tokenizer):
    def make(seed: int) -> TrainingRows:
        return TrainingRows(token_documents, 320, seed, 0.3, TASKS, tokenizer, length=200)

    rows = make(1)
    first = [rows[i] for i in range(200)]
    again = make(1)
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)
    order = random.Random(5).sample(range(200), 200)
    assert all(same(again[i], first[i]) for i in order)
    assert same(pickle.loads(pickle.dumps(again))[199], first[199])
    assert sum(same(make(2)[i], first[i]) for i in range(50)) == 0
    longer = TrainingRows(token_documents, 320, 1, 0.3, TASKS, tokenizer, length=900)
    assert all(same(longer[i], first[i]) for i in range(0, 200, 7))


@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 1.0])
def test_the_share_of_tasks_is_exact_and_spread(token_documents, tokenizer, share):
    rows = TrainingRows(token_documents, 320, 0, share, ["passkey"] if share else [], tokenizer, length=60)
    is_task = ["What is the pass key" in tokenizer.decode(rows[i]["input_ids"]) for i in range(60)]
    assert sum(is_task) == round(60 * share)
    assert all(abs(sum(is_task[:i]) - i * share) <= 1 for i in range(60))


def test_tasks_take_turns(token_documents, tokenizer):
    rows = TrainingRows(token_documents, 512, 0, 1.0, ["passkey", "code_lookup"], tokenizer, length=6)
    texts = [tokenizer.decode(rows[i]["input_ids"]) for i in range(6)]
    assert ["pass key" in text for text in texts] == [True, False] * 3
    assert ["telephone" in text for text in texts] == [False, True] * 3


def test_an_epoch_uses_every_token_but_the_remainder_once_and_the_next_cuts_anew(tokenizer):
    sizes = [70, 5, 333, 12, 90]
    starts = np.cumsum([0, *sizes])
    documents = [
        TokenDocument(f"w{i}", np.arange(start + 600, start + 600 + size, dtype=np.int32))
        for i, (start, size) in enumerate(zip(starts, sizes, strict=False))
    ]
    rows = TrainingRows(documents, 16, 0, 0.0, [], tokenizer)
    one_epoch = len(rows)
    many = TrainingRows(documents, 16, 0, 0.0, [], tokenizer, length=3 * one_epoch)
    epoch = [[t for t in many[i]["input_ids"].tolist() if t >= 600] for i in range(one_epoch)]
    seen = sorted(token for row in epoch for token in row)
    assert len(seen) == len(set(seen)) and sum(sizes) - len(seen) < 16
    cuts = {row[0] for row in epoch}
    later = {
        next(t for t in many[i]["input_ids"].tolist() if t >= 600) for i in range(one_epoch + 3, 2 * one_epoch - 3)
    }
    assert len(later - cuts) > len(later) // 2
    assert [row[0] for row in epoch] != sorted(row[0] for row in epoch)


def test_a_chat_is_never_filler_where_there_is_text(token_documents, tokenizer):
    chat = TokenDocument("chat", np.full(4000, 7, dtype=np.int32), np.ones(4000, dtype=bool))
    rows = TrainingRows([chat, *token_documents], 512, 0, 1.0, ["passage_repeat"], tokenizer, length=30)
    assert all(7 not in rows[i]["input_ids"].tolist() or (rows[i]["input_ids"] == 7).sum() < 100 for i in range(30))


def test_an_order_that_drops_every_target_is_drawn_again(tokenizer):
    ids = np.arange(100, 150, dtype=np.int32)
    chat = TokenDocument("chat", ids, ids >= 145)  # a row of 32 holds the answer or not, as the first cut falls
    rows = TrainingRows([chat], 32, 0, 0.0, [], tokenizer, length=100)
    assert all(bool((rows[i]["labels"] >= 145).any()) for i in range(100))
    with pytest.raises(ValueError, match="none of the 1 rows of 32 tokens has a target"):
        TrainingRows([TokenDocument("chat", ids, ids < 0)], 32, 0, 0.0, [], tokenizer)


def test_rows_are_full_and_indices_end(token_documents, tokenizer):
    rows = TrainingRows(token_documents, 320, 0, 0.25, TASKS, tokenizer)
    for i in range(len(rows)):
        row = rows[i]
        assert {tensor.shape for tensor in row.values()} == {(320,)} and {t.dtype for t in row.values()} == {
            torch.int64
        }
        assert row["labels"][0] == NO_TARGET and int((row["labels"] != NO_TARGET).sum()) > 300
    with pytest.raises(IndexError):
        rows[len(rows)]
    assert len(list(rows)) == len(rows)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"documents": []}, "data set is empty"),
        ({"row_length": 1}, "row_length=1"),
        ({"row_length": 10**6}, "row_length=1000000 tokens is longer than all documents"),
        ({"task_share": 1.5}, "task_share=1.5 must lie between 0"),
        ({"task_share": float("nan")}, "task_share=nan"),
        ({"tasks": []}, "tasks is empty"),
        ({"tasks": ["passkeys"]}, "unknown task 'passkeys'; allowed are code_lookup, .*, passkey,"),
        ({"tasks": "passkey"}, "is a string; give a list of names, such as \\[passkey\\]"),
        ({"row_length": 100}, "length=100 tokens is too short for the task 'passage_repeat', which needs 2"),
        ({"seed": -1}, "seed=-1"),
        ({"length": 0}, "length=0 rows"),
    ],
)
def test_bad_input_names_value_and_way_out(token_documents, tokenizer, changes, message):
    good = {"documents": token_documents, "row_length": 320, "seed": 0, "task_share": 0.5, "tasks": TASKS}
    with pytest.raises(ValueError, match=message):
        TrainingRows(**{**good, "tokenizer": tokenizer, **changes})
