"""Chunks of prompts by the pause that they make."""

import time

import pytest
from gated_models import gated_model

from retention_gates.recipes.serving.pace import LEAST, SHARE, fitting_chunk, seconds_of
from retention_gates.recipes.serving.rows import ChatRows


@pytest.fixture(scope="module")
def rows():
    return ChatRows(gated_model(), 8, rows=2, chunk_size=16)


@pytest.mark.parametrize("pause, expected", [(0.1, 64), (0.2, 128), (1.0, 512)])
def test_the_largest_chunk_that_fits_is_taken(rows, monkeypatch, pause, expected):
    """A device that takes 1 ms for a token and 5 ms for a step."""
    now = [0.0]
    read, step = rows.read, rows.step

    def reading(ids, start):
        now[0] += 1e-3 * len(ids)
        return read(ids[:2], start)

    def stepping(*arguments):
        now[0] += 5e-3
        return step(*arguments)

    monkeypatch.setattr(rows, "read", reading)
    monkeypatch.setattr(rows, "step", stepping)
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    assert seconds_of(rows, 100) == pytest.approx(0.105)
    assert fitting_chunk(rows, pause) == expected and 1e-3 * expected + 5e-3 <= SHARE * pause
    assert rows.columns == rows.steps == 0  # nothing is left of it
    with pytest.raises(ValueError, match=r"--max-pause-ms 20: a step and 16 tokens .* take 21 ms here, .* 26.[23] ms"):
        fitting_chunk(rows, 0.02)


def test_it_runs(rows):
    assert fitting_chunk(rows, 60.0) >= LEAST
