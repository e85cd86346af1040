"""That interpreted kernels are caught when they leave their tensors."""

import os

import pytest
import torch

triton = pytest.importorskip("triton")
import triton.language as tl  # noqa: E402

pytestmark = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="needs Triton's interpreter")


@triton.jit
def double(x, y, count, size, BLOCK: tl.constexpr, ATOMIC: tl.constexpr):
    place = tl.arange(0, BLOCK)
    values = tl.load(x + place, mask=place < count, other=0)
    if ATOMIC:
        tl.atomic_add(y + place, 2 * values, mask=place < size)
    else:
        tl.store(y + place, 2 * values, mask=place < size)


@pytest.mark.parametrize("is_atomic", [False, True])
@pytest.mark.parametrize("read, written, what", [(6, 5, None), (7, 5, "read"), (6, 6, "written|changed")])
def test_a_step_too_far_is_told(read, written, what, is_atomic):
    x, y = torch.arange(20.0)[4:10], torch.zeros(8)[:5]  # there is memory of theirs after both
    arguments = (x, y, read, written)
    if what is None:
        double[(1,)](*arguments, BLOCK=16, ATOMIC=is_atomic)
        assert torch.equal(y, 2 * x[:5])
        return
    with pytest.raises(Exception, match=f"1 of . numbers ({what}) outside"):
        double[(1,)](*arguments, BLOCK=16, ATOMIC=is_atomic)
