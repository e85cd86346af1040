"""Fixtures of the tests of recorded decoding steps."""

import pytest
from tape import TapeRecorder

from retention_gates.gates import decode_graph
from retention_gates.kernels.dispatch import VARIABLE


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request, monkeypatch):
    """Where to run; on a CPU a tape records."""
    if request.param == "cpu":
        monkeypatch.setitem(decode_graph.RECORDERS, "cpu", TapeRecorder)
        monkeypatch.setenv(VARIABLE, "naive")  # as on CUDA, no choice depends on numbers
    return request.param


@pytest.fixture
def recordings(monkeypatch):
    """One entry per recording that is made."""
    made, record = [], decode_graph.DecodeGraph._record
    monkeypatch.setattr(
        decode_graph.DecodeGraph, "_record", lambda self, *given: made.append(self) or record(self, *given)
    )
    return made
