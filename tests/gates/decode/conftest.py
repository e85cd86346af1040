"""Fixtures of the tests of captured decoding steps."""

import pytest
from tape import TapeRecorder

from retention_gates.gates.decode import step as decode_step
from retention_gates.kernels.dispatch import VARIABLE


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request, monkeypatch):
    """Where to run; on a CPU a tape captures."""
    if request.param == "cpu":
        monkeypatch.setitem(decode_step.RECORDERS, "cpu", TapeRecorder)
        monkeypatch.setenv(VARIABLE, "naive")  # as on CUDA, no choice depends on numbers
    return request.param


@pytest.fixture
def captures(monkeypatch):
    """One entry per capture that is made."""
    made, capture = [], decode_step.DecodeStep._capture
    monkeypatch.setattr(
        decode_step.DecodeStep, "_capture", lambda self, *given: made.append(self) or capture(self, *given)
    )
    return made
