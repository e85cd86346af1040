"""Pictures that are drawn from committed means: every mean stands where it belongs."""

import json

import pytest

from retention_gates.recipes.report import plots
from retention_gates.recipes.upkeep import draw_comparison


def test_the_committed_means_are_read_back():
    records = [json.loads(line) for line in draw_comparison.RESULTS.read_text(encoding="utf-8").splitlines()]
    found = draw_comparison.summaries(records, "SmolLM2-135M")
    assert {(s.task, s.length) for s in found} >= {("text", 2048), ("passkey", 1024)}
    last = {(r["case"], r["contender"]): r for r in records}
    for task, unit in (("text", "kl"), ("passkey", "token_accuracy")):
        record = last[f"SmolLM2-135M {task} T={2048 if task == 'text' else 1024} M=64 rows=48", "gates, calibrated"]
        (own,) = [
            s for s in found
            if (s.task, s.length) == (task, 2048 if task == "text" else 1024)
            and (s.policy, s.memory_size, s.budgets) == ("retention", 64, "calibrated")
        ]  # fmt: skip
        assert own.scores[unit].mean == record["value"] and own.scores[unit].standard_error == record["spread"]
    with pytest.raises(ValueError, match="'Nobody' has no scores: choose among .*SmolLM2-135M"):
        draw_comparison.summaries(records, "Nobody")


def test_a_picture_is_written(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(plots, "score_against_memory", lambda own, path: (drawn.append(len(own)), path.touch()))
    assert draw_comparison.main(["Gemma-3-270M", str(tmp_path / "picture.png")]) == 0
    assert drawn[0] > 100 and [path.name for path in tmp_path.iterdir()] == ["picture.png"]
