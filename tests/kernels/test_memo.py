"""The memory of one result: the same tensors give it again, anything else is worked out anew."""

import gc
import weakref

import torch

from retention_gates.kernels.memo import memo


def counting():
    calls = []

    @memo
    def total(tensor, factor):
        calls.append(factor)
        return tensor.sum() * factor

    return total, calls


def test_the_same_tensor_is_worked_on_once_until_written_to():
    total, calls = counting()
    tensor = torch.arange(4)
    assert total(tensor, 2) is total(tensor, 2) and calls == [2]
    tensor[0] = 5
    assert total(tensor, 2).item() == 22 and calls == [2, 2]


def test_equal_tensors_other_arguments_and_other_types_are_not_the_same():
    total, calls = counting()
    tensor = torch.arange(4)
    total(tensor, 2)
    total(tensor.clone(), 2)
    total(tensor, 3)
    total(tensor, 3.0)
    assert calls == [2, 2, 3, 3.0]


def test_no_argument_is_kept_alive():
    total, calls = counting()
    tensor = torch.arange(4)
    gone = weakref.ref(tensor)
    total(tensor, 2)
    del tensor
    gc.collect()
    assert gone() is None
    total(torch.arange(4), 2)
    assert calls == [2, 2]


def test_writes_that_are_not_counted_forbid_it():
    total, calls = counting()
    with torch.inference_mode():
        tensor = torch.arange(4)
        total(tensor, 2)
        tensor[0] = 5
        assert total(tensor, 2).item() == 22
    assert total(tensor, 2).item() == 22 and len(calls) == 3


def test_compiled_code_works_it_out_itself():
    total, _calls = counting()
    compiled = torch.compile(lambda tensor: total(tensor, 2), fullgraph=True, backend="eager")
    tensor = torch.arange(4)
    assert total(tensor, 2) == compiled(tensor) == 12
    tensor[0] = 5
    assert compiled(tensor).item() == 22
