"""What transformers and torch refuse is refused before anything is written."""

from pathlib import Path

import pytest
from tiny_run import make_run
from tiny_training import trainer_of

from retention_gates import cli

REFUSED = {
    "adam_beta1": 2.5,
    "adam_beta2": 2.0,
    "adam_epsilon": -1.0,
    "weight_decay": -1.0,
    "optim": "nonsense",
    "optim_args": "nonsense",
    "lr_scheduler_type": "nonsense",
    "lr_scheduler_kwargs": "nonsense",
    "warmup_steps": -1,
    "dataloader_num_workers": -1,
    "dataloader_prefetch_factor": 3,  # without workers
    "dataloader_persistent_workers": True,  # without workers
    "dataloader_multiprocessing_context": "nonsense",
    "gradient_checkpointing_kwargs": "nonsense",
    "log_level": "nonsense",
    "log_level_replica": "nonsense",
    "torch_compile_mode": "nonsense",
    "report_to": "nonsense",
    "save_strategy": "nonsense",
    "per_device_train_batch_size": 0,
    "gradient_accumulation_steps": 0,
    "logging_steps": 0,
    "save_steps": -1,
    "save_total_limit": -1,
    "max_grad_norm": -1.0,
    "per_device_eval_batch_size": 0,
    "parallelism_config": {"sp_size": 3},
    "fsdp": "nonsense",
    "deepspeed": "nonsense",
}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_run(tmp_path_factory.mktemp("run"), layers=2, max_steps=1, eval_strategy="no")


@pytest.mark.parametrize("name", REFUSED)
def test_the_command_refuses_it_and_writes_nothing(run: Path, capsys: pytest.CaptureFixture, name: str):
    assert cli.main(["train", str(run), f"training.{name}={REFUSED[name]}"]) == 2
    assert "error: " in capsys.readouterr().err
    assert not (run.parent / "out").exists()


@pytest.mark.parametrize(
    "changes, said",
    [
        ({"adam_beta2": 2.0}, r"No optimizer can be made with these values: Invalid beta .*adam_beta2=2.0"),
        ({"optim_args": "x"}, r"No optimizer can be made .*optim_args='x'"),
        ({"lr_scheduler_kwargs": {"cycles": 2}}, r"No learning rate schedule .*lr_scheduler_kwargs=\{'cycles': 2\}"),
        ({"dataloader_num_workers": -1}, r"No data loader .*dataloader_num_workers=-1"),
        ({"gradient_checkpointing_kwargs": "x"}, r"gradient_checkpointing_kwargs='x' must be a mapping"),
    ],
)
def test_a_trainer_refuses_it_by_its_value(tmp_path: Path, changes: dict, said: str):
    with pytest.raises(ValueError, match=said):
        trainer_of(tmp_path, **changes)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("optim", ["adamw_torch", "sgd", "adafactor", "adagrad"])
@pytest.mark.parametrize("schedule", ["linear", "constant_with_warmup", "cosine_with_restarts", "constant"])
def test_what_can_be_used_is(tmp_path: Path, optim: str, schedule: str):
    trainer_of(tmp_path, optim=optim, lr_scheduler_type=schedule)


def test_a_whole_number_is_a_float_too(run: Path, tmp_path: Path):
    assert cli.main(["train", str(run), "training.adam_beta1=0", f"training.output_dir={tmp_path / 'out'}"]) == 0
