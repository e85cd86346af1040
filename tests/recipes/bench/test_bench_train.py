"""The benches of training, as far as a CPU goes."""

import json
import sys
from pathlib import Path

import pytest
import torch
from peft import get_peft_model
from tiny_run import run_quietly
from transformers import AutoModelForCausalLM, LlamaConfig

from retention_gates import RetentionGateConfig
from retention_gates.recipes.bench import train, wire


def test_only_gradients_of_gates_cross_the_wire():
    done = run_quietly([sys.executable, wire.__file__])
    assert done.returncode == 0, done.stderr[-3000:]
    measured = wire.Wire(**json.loads(done.stdout.splitlines()[-1]))
    gates = 4 * measured.gate_parameters
    assert measured.gradients == gates  # once a step, although a step has two passes
    assert measured.every_collective == gates + 24  # and how many forecasts and passes the step has: three int64
    assert measured.start == gates  # nothing of the base, which all ranks have read
    assert measured.base_parameters > 10 * measured.gate_parameters


def test_the_base_has_no_gradient_and_no_optimiser_state(tmp_path: Path, monkeypatch, capsys):
    tiny = LlamaConfig(
        **wire.SHAPE | {"max_position_embeddings": 1024, "vocab_size": train.SMOLLM2_135M["vocab_size"]}
    )
    torch.manual_seed(0)
    model = get_peft_model(AutoModelForCausalLM.from_config(tiny), RetentionGateConfig(gate_width=16))
    monkeypatch.setattr(train, "START_STEPS", 1)
    trainer = train.small_trainer(model, 2, str(tmp_path), use_cpu=True, per_device_train_batch_size=1)
    progress = train.Progress()
    trainer.add_callback(progress)
    trainer.train()
    assert progress.start_up > 0 and progress.steady > 0 and progress.steps == 1
    assert "step 2: " in capsys.readouterr().err
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    assert all(parameter.grad is None for parameter in model.parameters() if not parameter.requires_grad)
    moments = [value for state in trainer.optimizer.state_dict()["state"].values() for value in state.values()]
    assert sum(moment.numel() for moment in moments if moment.ndim) == 2 * sum(map(torch.Tensor.numel, trained)) > 0


def test_a_case_that_needs_a_gpu_says_so(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("sys.argv", ["train.py", "--case", "long"])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit, match="--case long measures a GPU.*--case wire runs on a CPU"):
        train.main()
