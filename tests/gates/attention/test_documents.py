"""What a padding mask says to a cache."""

import pytest
import torch

from retention_gates.gates.attention.documents import padding_in
from retention_gates.kernels.dispatch import VARIABLE


@pytest.fixture(autouse=True)
def no_form_is_asked_for(monkeypatch):
    monkeypatch.delenv(VARIABLE, raising=False)


def test_a_mask_without_padding_says_nothing():
    assert padding_in(None, 2, 3) is None
    for dtype in (torch.int64, torch.bool, torch.float32):
        assert padding_in(torch.ones(2, 5, dtype=dtype), 2, 3) is None


def test_padding_is_handed_on_as_bool():
    mask = torch.ones(2, 5, dtype=torch.int64)
    assert padding_in(mask, 2, 3) is None
    mask[1, 0] = 0  # the same tensor, written to
    assert torch.equal(padding_in(mask, 2, 3), mask.bool())


def test_a_mask_of_another_shape_is_left_to_the_cache():
    for shape in ((1, 5), (2, 2)):
        assert padding_in(torch.ones(shape), 2, 3).shape == shape
    with pytest.raises(ValueError, match="2-D padding mask"):
        padding_in(torch.ones(2, 1, 1, 5), 2, 3)
