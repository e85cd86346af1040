"""A training step replayed as one CUDA graph."""

from pathlib import Path

import pytest
from tiny_training import gated, trainer_of

from retention_gates.trainers.callbacks import UNREPEATABLE
from retention_gates.trainers.config import RetentionTrainingArguments


def losses(folder: Path, *, cuda_graph: bool, **options) -> list[float]:
    settings = {"gradient_checkpointing": False, "max_steps": 8, "logging_steps": 1, "use_cpu": False}
    trainer = trainer_of(folder, gated("llama"), cuda_graph=cuda_graph, **(settings | options))
    trainer.train()
    assert (trainer._graph is not None) == cuda_graph
    return [entry for entry in trainer.state.log_history if "loss" in entry]


@pytest.mark.gpu
@pytest.mark.parametrize("options", [{"objective": "end_to_end"}, {"gradient_accumulation_steps": 2}])
def test_a_run_is_the_same_with_a_graph(tmp_path: Path, options: dict):
    plain = losses(tmp_path / "plain", cuda_graph=False, **options)
    graphed = losses(tmp_path / "graph", cuda_graph=True, **options)
    assert len(plain) == len(graphed) == 8 and plain[-1]["loss"] != plain[0]["loss"]
    for a, b in zip(plain, graphed, strict=True):
        assert a.keys() == b.keys()
        for name in [name for name in a if not name.startswith(UNREPEATABLE)]:
            assert b[name] == pytest.approx(a[name], rel=1e-4, abs=1e-6), name


@pytest.mark.gpu
def test_layerwise_too(tmp_path: Path):
    settings = {"objective": "layerwise", "gradient_checkpointing": None}
    plain = losses(tmp_path / "plain", cuda_graph=False, **settings)
    graphed = losses(tmp_path / "graph", cuda_graph=True, **settings)
    assert [x["loss"] for x in graphed] == pytest.approx([x["loss"] for x in plain], rel=1e-4)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"use_cpu": True}, False),  # nothing is copied
        ({"dataloader_pin_memory": True}, True),
        ({"dataloader_pin_memory": True, "accelerator_config": {"non_blocking": False}}, False),
    ],
)
def test_rows_are_copied_while_the_step_before_runs(tmp_path: Path, options: dict, expected: bool):
    args = RetentionTrainingArguments(output_dir=str(tmp_path), report_to=[], **options)
    assert args.accelerator_config.non_blocking == expected


def test_needs_a_gpu(tmp_path: Path):
    with pytest.raises(ValueError, match="cuda_graph=True on cpu, 1 processes"):
        trainer_of(tmp_path, gated("llama"), cuda_graph=True)


def test_excludes_recomputation(tmp_path: Path):
    options = {"output_dir": str(tmp_path), "use_cpu": True, "report_to": []}
    assert not RetentionTrainingArguments(cuda_graph=True, **options).gradient_checkpointing
    with pytest.raises(ValueError, match="gradient_checkpointing=True do not go together"):
        RetentionTrainingArguments(cuda_graph=True, gradient_checkpointing=True, **options)
