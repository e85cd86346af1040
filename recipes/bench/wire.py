"""Counts what ranks exchange in a training step: gradients by DDP, and what other collectives carry."""

import json
import os
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import wraps
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from peft import get_peft_model
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from transformers import AutoModelForCausalLM, LlamaConfig, TrainerCallback

from retention_gates import RetentionGateConfig
from retention_gates.trainers.config import RetentionTrainingArguments
from retention_gates.trainers.trainer import RetentionTrainer

STEPS = 4
SHAPE: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 3, "vocab_size": 500}
# As torch.distributed names them; DDP hands over its parameters in C++ when it is made, by the first.
COLLECTIVES = (
    "_broadcast_coalesced",
    "broadcast",
    "all_reduce",
    "all_gather",
    "all_gather_into_tensor",
    "reduce",
    "reduce_scatter_tensor",
    "gather",
    "scatter",
)
SHAPE |= {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128}


@dataclass
class Wire:
    """Bytes that one rank hands over per optimiser step, and the parameters they stand for."""

    gradients: float
    every_collective: float
    start: float  # once, when the model is wrapped
    base_parameters: int
    gate_parameters: int


class GradientBytes(TrainerCallback):
    """Counts the buckets that DDP reduces."""

    def __init__(self) -> None:
        self.trainer: RetentionTrainer | None = None
        self.total = 0

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        assert self.trainer is not None
        wrapped = self.trainer.model_wrapped
        assert isinstance(wrapped, nn.parallel.DistributedDataParallel)
        wrapped.register_comm_hook(None, self._count)

    def _count(self, state: Any, bucket: dist.GradBucket) -> torch.futures.Future[torch.Tensor]:
        self.total += bucket.buffer().nbytes
        assert dist.group.WORLD is not None
        return allreduce_hook(dist.group.WORLD, bucket)


class CollectiveBytes(TrainerCallback):
    """Counts the tensors handed to torch.distributed, before the first step and from then on."""

    def __init__(self) -> None:
        self.start = self.steps = self.total = 0
        for name in COLLECTIVES:
            setattr(dist, name, self._counting(getattr(dist, name)))

    def _counting(self, collective: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(collective)
        def count(*arguments: Any, **options: Any) -> Any:
            values = [*arguments, *options.values()]
            flat = [x for value in values for x in (value if isinstance(value, (list, tuple)) else [value])]
            self.total += sum(x.nbytes for x in flat if isinstance(x, torch.Tensor))
            return collective(*arguments, **options)

        return count

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        self.start, self.total = self.total, 0

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        self.steps = self.total


def bytes_per_step(ranks: int = 2) -> Wire:
    """Trains a small model on that many gloo ranks, in forked processes: no backward pass may have run in this one."""
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.start_processes(_rank, args=(ranks, folder), nprocs=ranks, start_method="fork")
        return Wire(**json.loads((Path(folder) / "wire.json").read_text(encoding="utf-8")))


def _rank(rank: int, ranks: int, folder: str) -> None:
    gradients, collectives = GradientBytes(), CollectiveBytes()
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1"}
    os.environ |= {"MASTER_PORT": "0"}  # for those who ask; the ranks meet in a file
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=ranks)
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = get_peft_model(AutoModelForCausalLM.from_config(LlamaConfig(**SHAPE)), RetentionGateConfig(gate_width=16))
    parameters = {True: 0, False: 0}
    for parameter in model.parameters():
        parameters[parameter.requires_grad] += parameter.numel()
    ids = torch.randint(500, (2 * ranks * STEPS, 64))
    rows = [{"input_ids": row, "labels": row, "position_ids": torch.arange(64)} for row in ids]
    arguments = RetentionTrainingArguments(
        output_dir=folder,
        memory_size=8,
        max_steps=STEPS,
        rows_per_step=2 * ranks,  # two passes a step: gradients are exchanged in the second
        per_device_train_batch_size=1,
        save_strategy="no",
        logging_strategy="no",
        report_to=[],
        disable_tqdm=True,
        use_cpu=True,
    )
    trainer = RetentionTrainer(model, arguments, rows, callbacks=[gradients, collectives])
    gradients.trainer = trainer
    trainer.train()
    every = (collectives.steps / STEPS, collectives.start)
    wire = Wire(gradients.total / STEPS, *every, parameters[False], parameters[True])
    if rank == 0:
        (Path(folder) / "wire.json").write_text(json.dumps(asdict(wire)), encoding="utf-8")
    dist.barrier()


if __name__ == "__main__":
    print(json.dumps(asdict(bytes_per_step())))
