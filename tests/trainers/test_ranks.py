"""Two processes train as one does on the same rows."""

import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file
from tiny_run import logged, make_run, run_quietly, train_command

from retention_gates.recipes import train
from retention_gates.trainers.checkpoint import read_manifest

SCRIPT = Path(train.__file__).resolve()


@pytest.mark.slow  # three processes that each import torch and transformers
# A rank's terms are means over its own row: rows differ in the forecasts they count by one or two of 47, and the
# layerwise error is relative to the size of a batch's activations.
@pytest.mark.parametrize("objective, relative, absolute", [("end_to_end", 1e-4, 1e-3), ("layerwise", 1e-2, 0.02)])
def test_two_ranks_are_one_run(tmp_path: Path, objective: str, relative: float, absolute: float):
    config = str(make_run(tmp_path, objective=objective))
    torchrun = [str(Path(sys.executable).parent / "torchrun"), "--standalone", "--nproc_per_node", "2"]
    overrides = ["training.per_device_train_batch_size=1", f"training.output_dir={tmp_path / 'two'}"]
    for command in ([*torchrun, str(SCRIPT), config, *overrides], train_command(config)):
        done = run_quietly(command)
        assert done.returncode == 0, done.stderr[-3000:]
    manifest = read_manifest(tmp_path / "two" / "checkpoint-8")
    assert manifest["ranks"] == 2 and manifest["rows_per_step"] == 2  # not one process twice, as some launchers do
    assert {"rng_state_0.pth", "rng_state_1.pth"} <= manifest["files"].keys()

    two, one = logged(tmp_path / "two"), logged(tmp_path / "out")
    for name in ("loss", "capacity_loss", "retained_mass", "eval_kl_8"):
        values = [[line[name] for line in lines if name in line] for lines in (two, one)]
        assert values[0] == pytest.approx(values[1], rel=relative), name
    gates = [load_file(tmp_path / run / "adapter" / "adapter_model.safetensors") for run in ("two", "out")]
    assert all(((gates[0][key] - gates[1][key]).abs() < absolute).all() for key in gates[1])
