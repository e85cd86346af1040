"""Stretches of visible tokens against a loop over all pairs."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from retention_gates.kernels.retention_attention.spans import visible_spans


@st.composite
def packed_rows(draw, tokens=24, rows=2):
    """[B, T] of documents that follow each other, with padding before, between, inside and after them."""
    ids = []
    for _ in range(rows):
        lengths = draw(st.lists(st.integers(1, 9), max_size=5))
        row = [document for document, length in enumerate(lengths) for _ in range(length)]
        for place in draw(st.lists(st.integers(0, tokens), max_size=8)):
            row.insert(place, -1)
        ids.append((row + [-1] * tokens)[:tokens])
    return ids


@given(packed_rows(), st.one_of(st.none(), st.integers(1, 30)))
def test_spans_say_which_pairs_are_visible(ids, window):
    """Either of the two spans decides about real tokens, and both say that padding sees and is seen by nothing."""
    tokens = len(ids[0])
    first, last = visible_spans(torch.tensor(ids), window, (len(ids), tokens), torch.device("cpu"))
    assert first.dtype == last.dtype == torch.int32
    for row, document in enumerate(ids):
        for t in range(tokens):
            for i in range(t + 1):
                real = document[t] >= 0 and document[i] >= 0
                visible = real and document[t] == document[i] and (window is None or t - i < window)
                by_query, by_key = bool(first[row, t] <= i), bool(t <= last[row, i])
                assert (by_query and by_key) == visible, (row, t, i)
                if real:
                    assert by_query == by_key == visible, (row, t, i)


@given(st.integers(1, 20), st.integers(1, 25))
def test_a_window_alone(tokens, window):
    first, last = visible_spans(None, window, (2, tokens), torch.device("cpu"))
    for t in range(tokens):
        seen = [i for i in range(tokens) if i <= t and t - i < window]
        assert first[1, t].clamp(min=0) == seen[0]
        assert [i for i in range(t + 1) if t <= last[0, i]] == seen


def test_without_limits_there_are_no_spans():
    assert visible_spans(None, None, (2, 5), torch.device("cpu")) is None
