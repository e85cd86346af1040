"""The files for accelerate launch: Accelerate reads them, and what they start trains the same gates."""

import json
import os
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils.launch import prepare_deepspeed_cmd_env, prepare_multi_gpu_env
from safetensors.torch import load_file
from tiny_run import make_run, run_quietly

from retention_gates.recipes import train
from retention_gates.trainers.distributed.sequence_parallel import ranks_per_row

RECIPES = Path(train.__file__).resolve().parent
FILES = sorted((RECIPES / "runs" / "accelerate").glob("*.yaml"))
DRIVER = Path(__file__).parents[2] / "support" / "run_ranks.py"


def launched_by(file: Path) -> tuple:
    """The settings that accelerate launch takes from a file, and what it tells the processes that it starts."""
    arguments = launch_command_parser().parse_args(["--config_file", str(file), str(RECIPES / "train.py"), "run.yaml"])
    arguments.nondefault = []
    arguments, file_says, _ = _validate_launch_command(arguments)
    arguments.deepspeed_fields_from_accelerate_config = ",".join(file_says.deepspeed_config)
    before = dict(os.environ)
    if arguments.use_deepspeed:
        if not find_spec("deepspeed"):
            pytest.skip("deepspeed is not installed")
        environment = prepare_deepspeed_cmd_env(arguments)[1]
    else:
        environment = prepare_multi_gpu_env(arguments)
    return arguments, {key: value for key, value in environment.items() if value != before.get(key)}


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_accelerate_reads_the_file(file: Path):
    config = load_config_from_file(str(file))
    assert config.mixed_precision in ("no", None) and not config.use_cpu
    assert config.num_processes == {"one_gpu": 1, "two_nodes": 16}.get(file.stem, 2)
    kind = {"one_gpu": "NO", "fsdp2": "FSDP", "zero2": "DEEPSPEED", "zero3": "DEEPSPEED"}.get(file.stem, "MULTI_GPU")
    assert config.distributed_type.value == kind
    if kind == "DEEPSPEED":
        settings = RECIPES.parent / config.deepspeed_config["deepspeed_config_file"]
        assert json.loads(settings.read_text())["zero_optimization"]["stage"] == int(file.stem[-1])
    if kind == "FSDP":
        assert config.fsdp_config["fsdp_version"] == 2


def test_there_is_a_file_for_each_shape_of_machine():
    assert [file.stem for file in FILES] == ["ddp", "fsdp2", "one_gpu", "two_nodes", "ulysses", "zero2", "zero3"]


def test_what_is_launched_for_shared_rows_shares_them(monkeypatch: pytest.MonkeyPatch):
    _, environment = launched_by(RECIPES / "runs" / "accelerate" / "ulysses.yaml")
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert ranks_per_row(None, ranks=8) == 2
    assert os.environ["ACCELERATE_USE_PARALLELISM_CONFIG"] == "false"  # else Accelerate would look for DeepSpeed


@pytest.mark.slow  # six processes that start and train
@pytest.mark.parametrize("stem", ["fsdp2", "zero2", "zero3"])
def test_the_adapter_of_a_sharded_run_is_the_one_of_two_whole_copies(tmp_path: Path, stem: str, monkeypatch):
    """Complete, of the same form and of the same values, evaluated and calibrated on the way, and resumable.

    The same again with each row split over both ranks.
    """
    monkeypatch.chdir(RECIPES.parent)
    _, environment = launched_by(RECIPES / "runs" / "accelerate" / f"{stem}.yaml")
    environment = {k: v for k, v in environment.items() if k.startswith(("ACCELERATE", "FSDP"))}
    assert environment.get("FSDP_VERSION") == "2" or environment["ACCELERATE_USE_DEEPSPEED"] == "true"
    options = {"objective": "end_to_end", "use_cpu": False, "max_steps": 4, "save_steps": 2, "disable_tqdm": True}
    options["rows_per_step"] = 2
    config = str(make_run(tmp_path, layers=2, per_device_train_batch_size=1, **options))

    def run(name: str, environment: dict[str, str], *more: str) -> dict:
        arguments = [config, f"training.output_dir={tmp_path / name}", *more]
        return {"ranks": 2, "arguments": arguments, "environment": environment}

    runs = tmp_path / "runs.json"
    split = run("split", environment, "training.parallelism_config={sp_size: 2}")
    runs.write_text(json.dumps([run("whole", {}, "training.use_cpu=true"), run("sharded", environment), split]))
    done = run_quietly([sys.executable, str(DRIVER), str(runs), "--sharded"])
    assert done.returncode == 0, done.stderr[-4000:]
    adapters = [tmp_path / name / "adapter" for name in ("whole", "sharded", "split")]
    whole, sharded, halves = (load_file(adapter / "adapter_model.safetensors") for adapter in adapters)
    assert whole.keys() == sharded.keys() == halves.keys()
    for name, weights in whole.items():
        assert sharded[name].dtype == torch.float32
        torch.testing.assert_close(sharded[name], weights, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(halves[name], weights, rtol=1e-5, atol=1e-6)
    configs = [json.loads((adapter / "adapter_config.json").read_text()) for adapter in adapters]
    shares = [torch.tensor(config.pop("budget_shares")) for config in configs]
    torch.testing.assert_close(shares[1], shares[0], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(shares[2], shares[0], rtol=1e-4, atol=1e-4)
    assert [config.pop("weights_sha256") for config in configs] and configs[0] == configs[1]

    (tmp_path / "sharded" / "adapter" / "adapter_model.safetensors").unlink()
    last = tmp_path / "sharded" / "checkpoint-4" / "adapter_model.safetensors"
    last.write_bytes(b"")  # the run goes on from checkpoint-2
    runs.write_text(json.dumps([run("sharded", environment, "resume=true")]))
    done = run_quietly([sys.executable, str(DRIVER), str(runs), "--sharded"])
    assert done.returncode == 0, done.stderr[-4000:]
    assert "goes on from checkpoint-2" in runs.with_suffix(".output").read_text()
    again = load_file(adapters[1] / "adapter_model.safetensors")
    assert all(torch.equal(again[name], weights) for name, weights in sharded.items())


def test_an_engine_that_accelerate_leaves_out_on_a_cpu_is_refused(tmp_path: Path):
    """FSDP and DeepSpeed asked for on a CPU: Accelerate would run plain copies, or each process alone."""
    environment = os.environ | {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}
    script = [str(Path(sys.executable).parent / "retention-gates"), "train", str(make_run(tmp_path, layers=2))]
    done = run_quietly([*script], env=environment)
    assert done.returncode == 2 and "fsdp was asked for, but Accelerate runs NO" in done.stderr
