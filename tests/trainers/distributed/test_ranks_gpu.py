"""Two GPUs train as one does on the same rows: launched with the files of recipes/runs/accelerate, over NCCL."""

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
from tiny_run import assert_same_run, make_run

from retention_gates.recipes import train
from retention_gates.trainers.checkpoint import read_manifest

pytestmark = pytest.mark.multi_gpu

RECIPES = Path(train.__file__).resolve().parent
ROWS_PER_PASS = {"one_gpu": 4, "ddp": 2, "ulysses": 4, "fsdp2": 2}
if find_spec("deepspeed"):
    ROWS_PER_PASS |= {"zero2": 2, "zero3": 2}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All at once: most of their time they start."""
    folder = tmp_path_factory.mktemp("ranks")
    options = {"objective": "end_to_end", "rows_per_step": 4, "use_cpu": False, "disable_tqdm": True}
    config = make_run(folder, layers=2, **options)
    started = []
    for number, (stem, rows) in enumerate(ROWS_PER_PASS.items()):
        launch = [sys.executable, "-m", "accelerate.commands.launch", "--main_process_port", str(29_600 + number)]
        launch += ["--config_file", str(RECIPES / "runs" / "accelerate" / f"{stem}.yaml"), str(RECIPES / "train.py")]
        launch += [str(config), f"training.output_dir={folder / stem}", f"training.per_device_train_batch_size={rows}"]
        with open(folder / f"{stem}.output", "w") as output:
            environment = os.environ | {"TRITON_INTERPRET": "0"}
            process = subprocess.Popen(
                launch, stdout=output, stderr=subprocess.STDOUT, cwd=RECIPES.parent, env=environment
            )
        started.append((stem, process))
    failed = [stem for stem, process in started if process.wait(timeout=300)]
    said = [f"{stem}:\n{(folder / f'{stem}.output').read_text()[-3000:]}" for stem in failed]
    assert not failed, "\n".join(said)
    return folder


@pytest.mark.parametrize("stem", [stem for stem in ROWS_PER_PASS if stem != "one_gpu"])
def test_the_losses_and_gates_are_those_of_one_gpu(runs: Path, stem: str):
    assert read_manifest(runs / stem / "checkpoint-8")["ranks"] == 2
    assert_same_run(runs / stem, runs / "one_gpu", rel=1e-4, weights=1e-3)
