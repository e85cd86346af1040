"""Every fuzzer runs, and one that meets a fault says which case it was."""

import fuzzers
import pytest
import run

QUICK = ["cache", "simulation", "memory_file", "adapter", "checkpoint", "rows"]  # kills have a test of their own


@pytest.mark.parametrize("name", QUICK)
def test_a_few_cases(name):
    result = run.fuzz(name, seed=1, first=0, cases=4, seconds=60.0)
    assert result["cases"] == 4 and not result["faults"], result["faults"]


def test_a_fault_is_told_with_its_case(monkeypatch):
    def broken(folder):
        def case(rng):
            assert rng.random() < 0.5, "promise"

        return case

    monkeypatch.setitem(fuzzers.FUZZERS, "broken", (broken, 1))
    found = run.fuzz("broken", seed=1, first=10, cases=30, seconds=60.0)
    numbers = [number for number, _ in found["faults"]]
    assert 0 < len(numbers) <= run.MOST_FAULTS and all("promise" in text for _, text in found["faults"])
    again = run.fuzz("broken", seed=1, first=numbers[0], cases=1, seconds=60.0)
    assert [number for number, _ in again["faults"]] == numbers[:1]
