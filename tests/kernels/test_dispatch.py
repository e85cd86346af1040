"""Which form of an op runs, and that the log says so once."""

import logging

import pytest
import torch

from retention_gates.kernels import dispatch
from retention_gates.kernels.dispatch import VARIABLE, use_cpu, use_fused


@pytest.fixture(autouse=True)
def nothing_told(monkeypatch):
    monkeypatch.setattr(dispatch, "_told", set())
    monkeypatch.delenv(VARIABLE, raising=False)


def test_cpu_tensors_run_naive_until_asked_otherwise(monkeypatch):
    tensor = torch.zeros(1)
    assert not use_fused("op", tensor)
    monkeypatch.setenv(VARIABLE, "fused")
    assert use_fused("op", tensor)  # the tests run Triton's interpreter
    monkeypatch.setenv(VARIABLE, "naive")
    assert not use_fused("op", tensor)


def test_numbers_decide_on_a_cpu_where_no_form_is_asked_for(monkeypatch):
    assert use_cpu(torch.zeros(1)) and not use_cpu(torch.zeros(1, device="meta"))
    traced = torch.compile(lambda x: x + use_cpu(x), fullgraph=True, backend="eager")
    assert traced(torch.zeros(1)) == 0
    for form in ("naive", "fused"):
        monkeypatch.setenv(VARIABLE, form)
        assert not use_cpu(torch.zeros(1))


@pytest.mark.gpu
def test_cuda_tensors_run_fused_until_asked_otherwise(monkeypatch):
    tensor = torch.zeros(1, device="cuda")
    assert use_fused("op", tensor)
    monkeypatch.setenv(VARIABLE, "naive")
    assert not use_fused("op", tensor)


def test_fused_where_no_kernel_runs_is_refused(monkeypatch):
    monkeypatch.setenv(VARIABLE, "fused")
    monkeypatch.delenv("TRITON_INTERPRET")
    with pytest.raises(ValueError, match="fused kernels need CUDA and Triton"):
        use_fused("op", torch.zeros(1))


def test_unknown_value_is_refused(monkeypatch):
    monkeypatch.setenv(VARIABLE, "fast")
    with pytest.raises(ValueError, match="'fast' is unknown: set it to 'naive' or 'fused'"):
        use_fused("op", torch.zeros(1))


def test_the_log_says_once_per_op(caplog, monkeypatch):
    with caplog.at_level(logging.INFO, logger="retention_gates.kernels"):
        for op in ("first", "first", "second"):
            use_fused(op, torch.zeros(1))
        monkeypatch.setenv(VARIABLE, "fused")
        use_fused("first", torch.zeros(1))
    assert [record.getMessage() for record in caplog.records] == [
        "first runs naive (plain torch) on cpu",
        "second runs naive (plain torch) on cpu",
        "first runs fused (Triton) on cpu",
    ]
