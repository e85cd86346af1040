"""The ablation: which runs there are, what is not done again, and one run from training to its line."""

import json
import sys
from pathlib import Path

import pytest
import yaml
from tiny_run import make_run

from retention_gates.recipes.bench import ablation as bench

VARIANTS = {"plain": {}, "shared": {"training.capacity_scope": "model"}}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """An ablation of a run that takes seconds."""
    recipe = make_run(tmp_path, eval_strategy="no", save_strategy="no", max_steps=2, warmup_steps=0, learning_rate=1.0)
    run = yaml.safe_load(recipe.read_text())
    run["training"].pop("eval_steps")
    recipe.write_text(yaml.safe_dump(run))
    content = {
        "recipe": recipe.name,
        "variants": VARIANTS,
        "overrides": {"training.disable_tqdm": True},
        "seeds": [3, 4],
        "evaluation": {"memory_sizes": [8, 16], "rows": 2, "length": 64, "start": 16}
        | {"task": "passage_repeat", "examples": 2, "task_length": 224},
    }
    (tmp_path / "ablation.yaml").write_text(yaml.safe_dump(content))
    return tmp_path / "ablation.yaml"


def test_runs_go_seed_by_seed_and_are_told_apart(path: Path):
    ablation = bench.read_ablation(path)
    runs = bench.runs_of(ablation)
    assert [(run.seed, run.variant) for run in runs] == [(s, v) for s in (3, 4) for v in ("plain", "shared")]
    assert len({run.key for run in runs}) == 4
    assert 'training.capacity_scope="model"' in runs[1].overrides and "training.seed=3" in runs[1].overrides
    keys = [run.key for run in runs]
    ablation.evaluation.start = 17
    assert not set(keys) & {run.key for run in bench.runs_of(ablation)}
    path.write_text(path.read_text().replace("memory_sizes", "memory_size"))
    with pytest.raises(ValueError, match="nearest is evaluation.memory_sizes"):
        bench.read_ablation(path)


def test_the_table_has_means_and_deviations_of_what_is_there(path: Path, tmp_path: Path):
    ablation = bench.read_ablation(path)
    runs = bench.runs_of(ablation)
    names = ["kl calibrated 8", "kl calibrated 16", "exact calibrated 8", "exact calibrated 16", "exact full"]
    lines = [
        {"key": run.key, "variant": run.variant, "scores": dict.fromkeys(names, value), "train_seconds": 2.0}
        for run, value in zip(runs[:3], (0.5, 1.0, 0.7), strict=True)
    ]
    torn = json.dumps(lines[0])[:40]
    (tmp_path / "results.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + torn)
    table = bench.table(runs, bench.read_results(tmp_path), ablation).splitlines()
    assert table[2] == f"| plain | 2 | {' | '.join(['0.600 ± 0.141'] * 5)} | 2 |"
    assert table[3] == f"| shared | 1 | {' | '.join(['1.000'] * 5)} | 2 |"
    assert bench.read_results(tmp_path / "nowhere") == {}


def test_a_run_ends_as_a_line_and_is_not_done_again(path: Path, tmp_path: Path, monkeypatch, capsys):
    output = tmp_path / "results"
    command = ["ablation", str(path), "--output", str(output), "--only", "shared"]
    path.write_text(path.read_text() + "keep: true\n")
    monkeypatch.setattr(sys, "argv", command)
    bench.main()
    lines = (output / "results.jsonl").read_text().splitlines()
    results = [json.loads(line) for line in lines]
    assert [(result["variant"], result["seed"]) for result in results] == [("shared", 3), ("shared", 4)]
    assert results[0]["scores"] != results[1]["scores"]
    assert all(result["scores"]["kl calibrated 8"] > result["scores"]["kl calibrated 16"] > 0 for result in results)
    assert (output / "shared-3" / "adapter" / "adapter_config.json").is_file()
    assert (output / "shared-4" / "run.yaml").is_file()

    (output / "results.jsonl").write_text(lines[0] + "\n")
    monkeypatch.setattr(sys, "argv", [*command, "--minutes", "0"])
    capsys.readouterr()
    bench.main()
    assert (output / "results.jsonl").read_text() == lines[0] + "\n"
    assert "stopped before shared, seed 4" in capsys.readouterr().out
    path.write_text(path.read_text().replace("keep: true", "keep: false"))
    monkeypatch.setattr(sys, "argv", command)
    bench.main()
    again = json.loads((output / "results.jsonl").read_text().splitlines()[1])
    assert again["scores"] == results[1]["scores"], "no run depends on those before it in the process"


def test_runs_of_one_call_share_their_texts(path: Path, tmp_path: Path, monkeypatch):
    content = yaml.safe_load(path.read_text())
    content["variants"] = {"other": {"data.test_works": ["work1"]}}
    (tmp_path / "other.yaml").write_text(yaml.safe_dump(content))
    output = str(tmp_path / "results")
    monkeypatch.setattr(sys, "argv", ["ablation", str(path), str(tmp_path / "other.yaml"), "--output", output])
    with pytest.raises(ValueError, match="must share base model"):
        bench.main()
