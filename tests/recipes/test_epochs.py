"""A run over several epochs of a streamed data set goes on from any step as if it had not stopped."""

import json
import random
import shutil
from pathlib import Path

import datasets
import pytest
import yaml
from safetensors.torch import load_file
from tiny_run import WORDS, logged, make_run

from retention_gates import cli
from retention_gates.recipes import train
from retention_gates.recipes.loading.run_config import load_config
from retention_gates.trainers.checkpoint import checkpoints_in

STEPS = 8


@pytest.fixture(scope="module")
def texts() -> list[str]:
    return [" ".join(random.Random(i).choices(WORDS, k=40 + i)) for i in range(9)]


@pytest.fixture
def config(tmp_path: Path, texts: list[str], monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run of 2 rows a step over a data set of 3 rows."""

    def load_dataset(name, subset, *, split, streaming):
        rows = datasets.Dataset.from_dict({"text": texts}).to_iterable_dataset(num_shards=3)
        assert streaming
        return rows

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    config = make_run(tmp_path, layers=2, max_steps=STEPS, save_steps=1, save_total_limit=STEPS, eval_strategy="no")
    run = yaml.safe_load(config.read_text())
    run["calibration"] = {"rows": 0}
    run["data"] = {"sources": [{"source": "user/name", "streaming": True, "limit": 4}], "row_length": 48}
    config.write_text(yaml.safe_dump(run))
    return config


def test_every_step_can_be_gone_on_from_in_every_epoch(config: Path):
    assert cli.main(["train", str(config)]) == 0
    out, kept = config.parent / "out", config.parent / "kept"
    rows = train.build(load_config(config, []))[0].train_dataset.rows
    rows[len(rows) - 1]  # which plans all epochs
    starts = [start for start in rows._epoch_starts if 0 < start < 2 * STEPS]
    assert len(starts) > 2 and any(start % 2 for start in starts)  # epochs end between steps and within them
    shutil.copytree(out, kept)
    weights = load_file(out / "adapter" / "adapter_model.safetensors")
    for step in range(1, STEPS):
        shutil.rmtree(out)
        shutil.copytree(kept, out)
        for checkpoint in checkpoints_in(out)[step:]:
            shutil.rmtree(checkpoint)
        shutil.rmtree(out / "adapter")
        assert cli.main(["train", str(config), "resume=true"]) == 0
        assert [line for line in logged(out) if "loss" in line] == [line for line in logged(kept) if "loss" in line]
        again = load_file(out / "adapter" / "adapter_model.safetensors")
        assert all((again[name] == tensor).all() for name, tensor in weights.items())


def test_rows_are_the_same_whoever_asks_first(config: Path):
    """Row i follows from the seed and i, in the second epoch too, whatever rows were looked at before."""
    first, second = (train.build(load_config(config, []))[0].train_dataset for _ in range(2))
    order = random.Random(1).sample(range(len(first)), len(first))
    assert len(first) > 3 * first.rows._epoch_starts[1]
    shuffled = {index: json.dumps(second[index]["input_ids"].tolist()) for index in order}
    assert all(json.dumps(first[index]["input_ids"].tolist()) == shuffled[index] for index in range(len(first)))
