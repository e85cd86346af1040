"""Several processes train as one does on the same rows."""

import shutil
from pathlib import Path

import pytest
import yaml
from tiny_run import assert_same_run, make_run, make_short_documents, run_on_ranks

from retention_gates.trainers.checkpoint import read_manifest

STEP = "training.rows_per_step=4"


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("ranks")
    options = {"objective": "end_to_end", "save_total_limit": 9, "capacity_normalisation": "excess"}
    config = make_run(folder, layers=2, **options)
    run = yaml.safe_load(config.read_text())
    run["data"] |= {"sources": [str(make_short_documents(folder / "short.jsonl"))], "test_works": None}
    run["data"]["test_fraction"] = 0.3
    config.write_text(yaml.safe_dump(run))

    def arguments(name: str, batch: int, *more: str) -> list[str]:
        sizes = [f"training.output_dir={folder / name}", f"training.per_device_train_batch_size={batch}", STEP]
        return [str(config), *sizes, *more]

    layerwise = "training.objective=layerwise"
    run_on_ranks(
        folder,
        [
            {"ranks": 1, "arguments": arguments("one", 4)},
            {"ranks": 2, "arguments": arguments("two", 2)},
            {"ranks": 1, "arguments": arguments("layerwise-one", 4, layerwise)},
            {"ranks": 2, "arguments": arguments("layerwise-two", 1, layerwise)},
        ],
    )
    moved = folder / "moved"
    shutil.copytree(folder / "two", moved)
    for left in ("checkpoint-6", "checkpoint-8", "adapter"):  # as if it had been killed before step 6
        shutil.rmtree(moved / left)
    (moved / "run.yaml").write_text((moved / "run.yaml").read_text().replace(str(folder / "two"), str(moved)))
    run_on_ranks(folder, [{"ranks": 1, "arguments": arguments("moved", 1, "resume=true")}])
    return folder


@pytest.mark.parametrize("one, two", [("one", "two"), ("layerwise-one", "layerwise-two"), ("one", "moved")])
def test_the_losses_are_those_of_one_rank(runs: Path, one: str, two: str):
    assert_same_run(runs / two, runs / one, rel=1e-5, weights=1e-4)


def test_what_was_run_is_what_was_meant(runs: Path):
    manifest = read_manifest(runs / "two" / "checkpoint-8")
    assert manifest["ranks"] == 2 and manifest["rows_per_step"] == 4  # not one process twice, as some launchers do
    assert {"rng_state_0.pth", "rng_state_1.pth"} <= manifest["files"].keys()
    said = (runs / "runs.output").read_text()
    assert "was written by 2 ranks, now there are 1. Steps see the same rows in the same order." in said
    assert [read_manifest(runs / "moved" / f"checkpoint-{step}")["ranks"] for step in (3, 6, 8)] == [2, 1, 1]
