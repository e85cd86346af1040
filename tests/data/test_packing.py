from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from retention_gates.data.packing import NO_TARGET, PackedRows, collate, pack_rows, sample_windows
from retention_gates.data.tokens import TokenDocument


def make_documents(lengths: list[int], *, chat: list[bool] | None = None, opening: int = 0) -> list[TokenDocument]:
    """Documents whose tokens are all different, from 100 on; `opening` tokens 1, 2.. stand first in each text."""
    documents, first = [], 100
    for index, length in enumerate(lengths):
        ids = np.arange(first, first + length, dtype=np.int32)
        is_chat = chat is not None and chat[index]
        targets = ids % 3 == 0 if is_chat else None
        if not is_chat:
            ids = np.concatenate([np.arange(1, opening + 1, dtype=np.int32), ids])
        documents.append(TokenDocument(f"work{index}", ids, targets))
        first += length
    return documents


def test_rows_worked_by_hand():
    rows = pack_rows(make_documents([5, 2, 6]), 4)
    assert len(rows) == 3 and rows.dropped_tokens == 1 and rows.rows_without_target == 0
    got = [{name: value.tolist() for name, value in rows[i].items()} for i in range(3)]
    no = NO_TARGET
    assert got == [
        {"input_ids": [100, 101, 102, 103], "position_ids": [0, 1, 2, 3], "labels": [no, 101, 102, 103]},
        {"input_ids": [104, 105, 106, 107], "position_ids": [0, 0, 1, 0], "labels": [no, no, 106, no]},
        {"input_ids": [108, 109, 110, 111], "position_ids": [0, 1, 2, 3], "labels": [no, 109, 110, 111]},
    ]
    assert all(tensor.dtype == torch.int64 for tensor in rows[0].values())


def test_a_piece_from_inside_a_document_opens_with_the_prefix():
    rows = pack_rows(make_documents([7, 3], opening=1), 5, prefix_ids=[1])
    assert [rows[i]["input_ids"].tolist() for i in range(2)] == [[1, 100, 101, 102, 103], [1, 104, 105, 106, 1]]
    assert rows[1]["position_ids"].tolist() == [0, 1, 2, 3, 0]
    assert rows[1]["labels"].tolist() == [NO_TARGET, 104, 105, 106, NO_TARGET]
    assert rows.dropped_tokens == 3


lengths = st.lists(st.integers(0, 30), min_size=1, max_size=12)


@given(lengths=lengths, row_length=st.integers(4, 20), opening=st.integers(0, 2), data=st.data())
def test_every_token_comes_once_in_order_and_no_target_crosses_documents(lengths, row_length, opening, data):
    chat = data.draw(st.lists(st.booleans(), min_size=len(lengths), max_size=len(lengths)))
    documents = make_documents(lengths, chat=chat, opening=opening)
    stream = [token for document in documents for token in document.ids.tolist() if token >= 100]
    document_of = {token: d for d, document in enumerate(documents) for token in document.ids.tolist()}
    is_target = {
        token: bool(document.targets is None or document.targets[i])
        for document in documents
        for i, token in enumerate(document.ids.tolist())
    }
    try:
        rows = PackedRows(documents, row_length, prefix_ids=range(1, opening + 1))
    except ValueError as error:
        assert "longer than all documents" in str(error)
        assert sum(len(document.ids) for document in documents) < row_length
        return
    seen = []
    for index in range(len(rows)):
        ids, positions, labels = (rows[index][name].tolist() for name in ("input_ids", "position_ids", "labels"))
        assert len(ids) == len(positions) == len(labels) == row_length
        assert positions[0] == 0 and any(label != NO_TARGET for label in labels)
        for t in range(row_length):
            assert positions[t] in (0, positions[t - 1] + 1)
            assert labels[t] in (NO_TARGET, ids[t])
            if positions[t] == 0:
                assert labels[t] == NO_TARGET
            elif ids[t] >= 100:
                expected = ids[t] if is_target[ids[t]] else NO_TARGET
                assert labels[t] == expected
                if ids[t - 1] >= 100:
                    assert ids[t] == ids[t - 1] + 1 and document_of[ids[t]] == document_of[ids[t - 1]]
        seen += [token for token in ids if token >= 100]
    if rows.rows_without_target == 0:
        assert seen == stream[: len(seen)]
        assert rows.dropped_tokens >= len(stream) - len(seen) and rows.dropped_tokens < row_length
    else:
        assert seen == sorted(set(seen))
        without = sum(not is_target[token] for token in set(stream) - set(seen))
        assert without > 0


@given(lengths=st.lists(st.integers(2, 30), min_size=1, max_size=8), data=st.data())
def test_another_order_and_first_cut_lose_nothing_but_the_remainder(lengths, data):
    documents = make_documents(lengths)
    order = data.draw(st.permutations(range(len(lengths))))
    first_cut = data.draw(st.integers(0, lengths[order[0]] - 1))
    rows = PackedRows(documents, 2, order=order, first_cut=first_cut)
    seen = [token for index in range(len(rows)) for token in rows[index]["input_ids"].tolist()]
    turned = [documents[order[0]].ids[first_cut:]] + [documents[i].ids for i in order[1:]]
    stream = np.concatenate([*turned, documents[order[0]].ids[:first_cut]]).tolist()
    if rows.rows_without_target == 0:
        assert seen == stream[: len(stream) - rows.dropped_tokens]
    assert rows.dropped_tokens == len(stream) % 2
    assert len(seen) + rows.dropped_tokens + 2 * rows.rows_without_target == len(stream)


def test_rows_without_a_target_are_counted():
    ids = np.arange(100, 112, dtype=np.int32)
    rows = pack_rows([TokenDocument("chat", ids, ids >= 109)], 4)
    assert len(rows) == 1 and rows.rows_without_target == 2
    assert rows[0]["labels"].tolist() == [NO_TARGET, 109, 110, 111]


def test_collate_stacks_rows():
    rows = pack_rows(make_documents([12]), 4)
    batch = collate([rows[0], rows[2]])
    assert batch["input_ids"].tolist() == [[100, 101, 102, 103], [108, 109, 110, 111]]
    assert {tensor.shape for tensor in batch.values()} == {(2, 4)}


@pytest.mark.parametrize(
    ("documents", "row_length", "prefix", "message"),
    [
        ([], 4, [], "data set is empty"),
        (make_documents([9]), 1, [], "row_length=1 tokens; a row needs 2 or more"),
        (make_documents([9]), 2, [1, 2], "row_length=2 tokens; a row needs 3 or more"),
        (make_documents([4, 5]), 10, [], "longer than all documents together, 9 tokens"),
        (make_documents([1, 1, 1, 1]), 2, [], "none of the 2 rows of 2 tokens has a target"),
    ],
)
def test_bad_input_names_value_and_way_out(documents, row_length, prefix, message):
    with pytest.raises(ValueError, match=message):
        pack_rows(documents, row_length, prefix_ids=prefix)


@given(lengths=st.lists(st.integers(0, 40), min_size=1, max_size=6), opening=st.integers(0, 1), data=st.data())
def test_windows_lie_in_one_document_and_never_overlap(lengths, opening, data):
    documents = make_documents(lengths, opening=opening)
    prefix = list(range(1, opening + 1))
    available = sum(length // (8 - opening) for length in lengths)
    count = data.draw(st.integers(1, max(1, available)))
    if not available:
        with pytest.raises(ValueError, match="these documents have 0 that don't overlap"):
            sample_windows(documents, 8, count, seed=0, prefix_ids=prefix)
        return
    windows = sample_windows(documents, 8, count, seed=3, prefix_ids=prefix)
    assert windows.shape == (count, 8) and windows.dtype == torch.int64
    assert windows[:, :opening].tolist() == [prefix] * count
    bodies = windows[:, opening:]
    assert bool((bodies.diff(dim=1) == 1).all()) and len(bodies.unique()) == bodies.numel()
    starts = {int(document.ids[opening]) for document in documents if len(document.ids) > opening}
    assert all(not starts & set(body[1:]) for body in bodies.tolist())
    assert torch.equal(windows, sample_windows(documents, 8, count, seed=3, prefix_ids=prefix))


def test_windows_take_turns_among_works_and_leave_out_what_is_repeated():
    documents = make_documents([100, 100, 100])
    documents[1:1] = [replace(document, is_repeat=True) for document in documents]
    windows = sample_windows(documents, 10, 9, seed=0)
    works = ((windows[:, 0] - 100) // 100).tolist()
    assert all(sorted(works[i : i + 3]) == [0, 1, 2] for i in (0, 3, 6))
    with pytest.raises(ValueError, match="count=31 windows of 10 tokens; these documents have 30"):
        sample_windows(documents, 10, 31, seed=0)
    with pytest.raises(ValueError, match="count=0"):
        sample_windows(documents, 10, 0, seed=0)
