"""Groups of ranks that share rows train as one rank does; and what cannot be split is refused before it is loaded."""

import json
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from accelerate import ParallelismConfig
from safetensors.torch import load_file
from tiny_models import tiny_config
from tiny_run import logged, make_run, make_short_documents, run_on_ranks
from tiny_training import Rows, arguments, gated

from retention_gates.recipes.loading.run_config import load_config
from retention_gates.recipes.train import build
from retention_gates.trainers.checkpoint import read_manifest
from retention_gates.trainers.checks import check_model
from retention_gates.trainers.distributed.sequence_parallel import check_heads, ranks_per_row
from retention_gates.trainers.rows import RowCollator

SPLIT = "training.parallelism_config={sp_size: 2}"
LAUNCHED = {"ACCELERATE_USE_PARALLELISM_CONFIG": "true", "PARALLELISM_CONFIG_SP_SIZE": "2"}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Rows of 48 tokens with many short documents, some of which cross the middle; 5 steps of 4 rows."""
    folder = tmp_path_factory.mktemp("groups")
    options = {"objective": "end_to_end", "capacity_normalisation": "excess", "max_steps": 5}
    config = make_run(folder, layers=2, **options)
    run = yaml.safe_load(config.read_text())
    run["data"] |= {"sources": [str(make_short_documents(folder / "short.jsonl"))], "test_works": None}
    run["data"]["test_fraction"] = 0.3
    run["evaluation"]["rows"] = 4
    config.write_text(yaml.safe_dump(run))

    def command(name: str, batch: int, *more: str) -> list[str]:
        sizes = [f"output_dir={folder / name}", f"per_device_train_batch_size={batch}", "rows_per_step=4"]
        return [str(config), *(f"training.{size}" for size in sizes), *more]

    run_on_ranks(
        folder,
        [
            {"ranks": 1, "arguments": command("whole", 4)},
            {"ranks": 2, "arguments": command("one group", 2), "environment": LAUNCHED},
        ],
    )
    moved = folder / "two groups"
    shutil.copytree(folder / "one group", moved)
    for left in ("checkpoint-5", "adapter"):  # as if it had been killed after step 3
        shutil.rmtree(moved / left)
    (moved / "run.yaml").write_text((moved / "run.yaml").read_text().replace(str(folder / "one group"), str(moved)))
    run_on_ranks(folder, [{"ranks": 4, "arguments": command("two groups", 1, SPLIT, "resume=true")}])
    return folder


@pytest.mark.parametrize("many", ["one group", "two groups"])
def test_losses_and_gates_are_those_of_one_rank(runs: Path, many: str):
    single, split = logged(runs / "whole"), logged(runs / many)
    names = {name for line in single for name in line} - {"epoch", "step"}
    assert {"loss", "forward_kl", "next_token_loss", "capacity_loss", "retained_mass", "grad_norm"} <= names
    # As in test_ranks.py: what a resumed run does not know, and a mean over tokens that decay.
    for name in names - {"total_flos", "train_loss", "log_half_life"}:
        values = [[line[name] for line in lines if name in line] for lines in (split, single)]
        assert len(values[0]) == len(values[1]) > 0
        assert values[0] == pytest.approx(values[1], rel=1e-5, abs=1e-6), name
    gates = [load_file(runs / run / "adapter" / "adapter_model.safetensors") for run in (many, "whole")]
    assert all(((gates[0][key] - gates[1][key]).abs() < 1e-5).all() for key in gates[1])
    shares = [json.loads((runs / run / "adapter" / "adapter_config.json").read_text()) for run in (many, "whole")]
    torch.testing.assert_close(*(torch.tensor(config["budget_shares"]) for config in shares), rtol=1e-4, atol=1e-4)


def test_what_was_run_is_what_was_meant(runs: Path):
    """Not copies of one rank with whole rows: as many rows in a step, of as many ranks, in fewer passes."""
    steps = [("whole", 5), ("one group", 5), ("two groups", 3), ("two groups", 5)]
    manifests = [read_manifest(runs / name / f"checkpoint-{step}") for name, step in steps]
    assert [manifest["ranks"] for manifest in manifests] == [1, 2, 2, 4]
    assert [manifest["ranks_per_row"] for manifest in manifests] == [1, 2, 2, 2]
    assert {manifest["rows_per_step"] for manifest in manifests} == {4}
    said = (runs / "runs.output").read_text()
    assert (
        "was written by 2 ranks (2 to a row), now there are 4 (2 to a row). Steps see the same rows in the same order."
        in said
    )


def test_a_part_of_a_batch_predicts_what_comes_after_it():
    rows = [Rows()[index] for index in range(2)]
    whole = RowCollator(None)(rows)
    parts = [RowCollator(None, part, 2)(rows) for part in range(2)]
    for name in ("input_ids", "position_ids", "targets", "counted"):
        assert torch.equal(torch.cat([part[name] for part in parts], 1), whole[name])
    assert parts[0]["targets"][0, -1] == rows[0]["input_ids"][24]  # the first token of the other part
    assert [sum(counts) for counts in zip(*(part["counts"] for part in parts), strict=True)] == list(whole["counts"])


def test_ranks_that_cannot_be_grouped_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    with pytest.raises(ValueError, match="sp_size=2 .* does not divide 1 ranks into groups: sp_size can be 1,"):
        arguments(tmp_path, parallelism_config=ParallelismConfig(sp_size=2))
    with pytest.raises(ValueError, match="sp_size=4 .* does not divide 6 ranks.*can be 1 or 2 or 3 or 6"):
        ranks_per_row({"sp_size": 4}, 6)
    with pytest.raises(ValueError, match="sp_size=2 with dp_replicate_size=3 does not divide 4 ranks"):
        ranks_per_row({"sp_size": 2, "dp_replicate_size": 3}, 4)
    assert ranks_per_row({"sp_size": 2, "dp_replicate_size": 2}, 4) == 2
    with pytest.raises(ValueError, match="{sp: 2} must hold whole numbers for sp_size and dp_replicate_size alone"):
        ranks_per_row({"sp": 2}, 4)
    with pytest.raises(ValueError, match="parallelism_config='2' must be a mapping"):
        ranks_per_row("2", 4)
    monkeypatch.setenv("WORLD_SIZE", "2")
    for name, value in (("cuda_graph", True), ("torch_compile", True), ("objective", "layerwise")):
        with pytest.raises(ValueError, match=f"sp_size=2 with {name}={value!r}.*Leave one of the two out"):
            arguments(tmp_path, parallelism_config={"sp_size": 2}, **{name: value})
    assert ranks_per_row(None, 2) == 1


@pytest.mark.parametrize("name", ["CP", "TP", "DP_SHARD"])
def test_other_ways_to_split_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str):
    monkeypatch.setenv(f"PARALLELISM_CONFIG_{name}_SIZE", "2")
    with pytest.raises(ValueError, match=rf"with {name.lower()}_size=2 would split .*offload: true"):
        arguments(tmp_path)


def test_heads_and_rows_that_cannot_be_split_are_refused_before_anything_is_loaded(tmp_path: Path, monkeypatch):
    config = make_run(tmp_path, layers=1, objective="end_to_end")
    shutil.rmtree(tmp_path / "texts")
    (tmp_path / "model" / "model.safetensors").unlink()
    run = load_config(config, [])
    run.training.ranks_per_row = 3
    run.data.row_length = 49
    with pytest.raises(ValueError, match=r"sp_size=3 does not divide a row of 49 tokens: .* of 48 or 51"):
        build(run)
    run.data.row_length = 48
    with pytest.raises(ValueError, match="sp_size=3 does not divide the 4 query heads.*sp_size can be 1 or 2"):
        build(run)
    with pytest.raises(ValueError, match="sp_size=4 does not divide the 2 KV heads"):
        check_heads(tiny_config("llama"), 4)


def test_rows_and_bases_that_cannot_be_split_are_refused(tmp_path: Path):
    args = arguments(tmp_path)
    args.ranks_per_row = 2
    with pytest.raises(ValueError, match="2 of the 4 layers of Gemma3ForCausalLM are no full attention"):
        check_model(gated("gemma3_text"), args)
    with pytest.raises(ValueError, match="GptOssForCausalLM has sinks of all heads"):
        check_model(gated("gpt_oss", layer_types=["full_attention"] * 4), args)
    with pytest.raises(ValueError, match="does not divide a row of 48 tokens"):
        RowCollator(None, 0, 5).check(Rows()[0])
