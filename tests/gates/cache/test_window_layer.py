"""A sliding window in places that stay holds and gives what transformers' own layer does."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers.cache_utils import DynamicSlidingWindowLayer

from retention_gates.gates.cache.window_layer import WindowLayer
from retention_gates.gates.decode.windows import Windows


def new_states(tokens, batch=2):
    return torch.randn(batch, 3, tokens, 4), torch.randn(batch, 3, tokens, 5)


@given(window=st.integers(2, 9), chunks=st.lists(st.integers(1, 25), min_size=1, max_size=8), beams=st.booleans())
def test_any_chunks_as_in_transformers(window, chunks, beams):
    ours, theirs = WindowLayer(window), DynamicSlidingWindowLayer(window)
    for turn in range(2):
        for tokens in chunks:
            assert ours.get_mask_sizes(tokens) == theirs.get_mask_sizes(tokens)
            key, value = new_states(tokens)
            for got, expected in zip(ours.update(key, value), theirs.update(key, value), strict=True):
                assert torch.equal(got, expected)
            assert ours.get_seq_length() == theirs.get_seq_length() == ours.seen
            if beams:
                for layer in (ours, theirs):
                    layer.reorder_cache(torch.tensor([1, 1]))
        if turn == 0:
            keys = ours.keys.data_ptr()
            ours.reset()
            theirs = DynamicSlidingWindowLayer(window)
    assert ours.keys.data_ptr() == keys


@given(window=st.integers(2, 9), prompt=st.integers(1, 25), steps=st.integers(1, 20), padding=st.integers(0, 25))
def test_one_token_at_a_time_in_place(window, prompt, steps, padding):
    """The places that a step sees hold the real columns of its window, each once."""
    layer, padding = WindowLayer(window), min(padding, prompt - 1)
    column = torch.arange(prompt + steps, dtype=torch.float32)
    states = column.view(1, 1, -1, 1).expand(2, 1, -1, 1)
    layer.update(states[:, :, :prompt], states[:, :, :prompt])
    mask = torch.ones(2, prompt + 1, dtype=torch.long)
    mask[1, :padding] = 0
    windows = Windows([layer], mask)
    for step in range(prompt, prompt + steps):
        with windows.one_token():
            keys, _ = layer.update(states[:, :, step : step + 1], states[:, :, step : step + 1])
        for row, first in enumerate((0, padding)):
            seen = keys[row, 0, :, 0][windows.visible[row]].sort().values
            assert torch.equal(seen, column[max(first, step - window + 1) : step + 1])


def test_columns_that_the_mask_does_not_have_are_padding():
    layer = WindowLayer(4)
    layer.update(*new_states(6))
    assert Windows([layer], torch.ones(2, 4, dtype=torch.long)).visible.sum(1).tolist() == [2, 2]
    assert Windows([layer], None).visible.sum(1).tolist() == [4, 4]


def test_it_does_not_go_back():
    layer = WindowLayer(4)
    layer.crop(0)
    with pytest.raises(ValueError, match="crop"):
        layer.crop(-1)
