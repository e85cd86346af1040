"""A trainer for a tiny model, to be looked at in the process of the test."""

from pathlib import Path

import torch
from peft import get_peft_model
from tiny_models import tiny_model

from retention_gates import RetentionGateConfig
from retention_gates.trainers.config import RetentionTrainingArguments
from retention_gates.trainers.trainer import RetentionTrainer

PACKED = torch.cat([torch.arange(30), torch.arange(18)])  # positions of two documents in a row of 48 tokens


class Rows(torch.utils.data.Dataset):
    """Rows of random tokens, the same at every look."""

    def __init__(self, count: int = 64, positions: torch.Tensor = PACKED, **changes: torch.Tensor):
        self.count, self.positions, self.changes = count, positions, changes

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        ids = torch.randint(3, 97, (len(self.positions),), generator=torch.Generator().manual_seed(index))
        return {"input_ids": ids, "position_ids": self.positions, "labels": ids.clone()} | self.changes


def gated(family: str = "llama", seed: int = 1, **changes):
    """A tiny model with gates whose half-lives, about 20 tokens, differ from token to token."""
    torch.manual_seed(seed)
    model = get_peft_model(tiny_model(family, **changes), RetentionGateConfig(gate_width=16, initial_half_life=20.0))
    for name, parameter in model.named_parameters():
        if "retention_gate" in name and parameter.ndim == 2:
            torch.nn.init.normal_(parameter, std=0.5)
    return model


def arguments(folder: Path, **changes) -> RetentionTrainingArguments:
    options = {"memory_size": 8, "max_steps": 6, "per_device_train_batch_size": 2, "logging_steps": 1, "report_to": []}
    options |= {"eval_memory_sizes": [8], "save_steps": 3, "use_cpu": True, "disable_tqdm": True, "warmup_steps": 2}
    return RetentionTrainingArguments(output_dir=str(folder / "out"), **(options | changes))


def trainer_of(folder: Path, model=None, rows=None, eval_rows=None, **changes) -> RetentionTrainer:
    return RetentionTrainer(model or gated(), arguments(folder, **changes), rows or Rows(), eval_dataset=eval_rows)


def batch_of(trainer: RetentionTrainer, count: int = 2) -> dict[str, torch.Tensor]:
    return trainer.data_collator([trainer.train_dataset[i] for i in range(count)])
