"""Checks of a model before its gates are trained."""

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from operator import mul
from typing import cast

import torch
from peft import PeftModel
from torch import nn
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader, Dataset
from transformers import PreTrainedModel, Trainer, get_scheduler

from retention_gates.gates.adapter.families import text_config
from retention_gates.gates.adapter.gate_outputs import record
from retention_gates.gates.adapter.model import find_gated_model
from retention_gates.gates.adapter.modes import evaluating
from retention_gates.gates.adapter.placement import check_room, check_trainable_placement
from retention_gates.trainers.config import RetentionTrainingArguments
from retention_gates.trainers.distributed.layout import engine_of
from retention_gates.trainers.distributed.sequence_parallel import check_heads, check_layers

WORKER_BYTES = 16 * 2**20  # what a worker's process has of its own at least
LOADER = ("num_workers", "pin_memory", "persistent_workers", "multiprocessing_context", "prefetch_factor", "in_order")
OPTIMIZER = ("optim", "optim_args", "learning_rate", "adam_beta1", "adam_beta2", "adam_epsilon", "weight_decay")
SCHEDULE = ("lr_scheduler_type", "lr_scheduler_kwargs", "warmup_steps")
PREPARED = {"params", "model", "optimizer_dict"}  # what transformers gives optimizers that hold the model's modules


def check_model(model: nn.Module, args: RetentionTrainingArguments) -> None:
    """Raises ValueError unless exactly the gates of `model` can be trained with `args`."""
    gated = find_gated_model(model)
    if not isinstance(model, PeftModel):
        raise ValueError(f"The model must be a PeftModel, as get_peft_model gives it, not a {type(model).__name__}.")
    gates = {f"{layer.base_layer.layer_idx}": layer.active_gate for layer in gated.gated_layers}
    parameters = {f"the gate of layer {i}: {n}": p for i, g in gates.items() if g for n, p in g.named_parameters()}
    if engine_of(args) == "replicated":  # a sharding engine places weights itself
        ends = {"the embedding": model.get_input_embeddings(), "lm_head": model.get_output_embeddings()}
        check_trainable_placement(gated.model, parameters, {name: end for name, end in ends.items() if end})
    for name, parameter in parameters.items():
        if parameter.dtype != torch.float32:
            raise ValueError(
                f"{name} is {parameter.dtype}, which would lose every update: gates train in torch.float32. Cast the "
                "base only, before get_peft_model."
            )
        if not parameter.requires_grad:
            raise ValueError(
                f"{name} is frozen: load the adapter with PeftModel.from_pretrained(..., is_trainable=True)."
            )
    own = {id(parameter) for parameter in parameters.values()}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and id(parameter) not in own:
            raise ValueError(f"{name} would be trained, but the base model stays frozen: requires_grad_(False) first.")
    protected = gated.active_config.protected_tokens
    for name, sizes in (("memory_size", [args.memory_size]), ("eval_memory_sizes", args.eval_memory_sizes)):
        if min(sizes, default=protected + 1) <= protected:
            raise ValueError(
                f"{name}={min(sizes)} leaves no room beside {protected} protected tokens: at least {protected + 1}."
            )
    if args.ranks_per_row > 1:
        check_heads(text_config(gated.model), args.ranks_per_row)
        check_layers(gated.model)
    if args.cuda_graph and (args.device.type != "cuda" or args.world_size > 1 or args.fp16):
        raise ValueError(
            f"cuda_graph=True on {args.device.type}, {args.world_size} processes, fp16={args.fp16}: it needs one "
            "process on a CUDA GPU and no loss scaling. Leave it out, or load the base in bf16."
        )
    kwargs = args.gradient_checkpointing_kwargs
    if args.device.type == "cpu" and isinstance(kwargs, dict) and kwargs.get("offload"):
        raise ValueError("offload=True moves checkpoints from a GPU to the CPU's memory, and there is no GPU here.")
    if args.n_gpu > 1:
        raise ValueError(
            f"One process sees {args.n_gpu} GPUs, which transformers would drive with DataParallel: start the run "
            "with accelerate launch, or show it one GPU (CUDA_VISIBLE_DEVICES=0)."
        )


def check_arguments(args: RetentionTrainingArguments, model: nn.Module, rows: Dataset) -> None:
    """Raises ValueError for what torch and transformers would only refuse when training starts."""
    workers = {name: getattr(args, f"dataloader_{name}") for name in LOADER if hasattr(args, f"dataloader_{name}")}
    count = args.dataloader_num_workers
    check_room("dataloader_num_workers", count, partial(mul, WORKER_BYTES), torch.device("cpu"), "for their processes")
    with _explained("data loader", args, [f"dataloader_{name}" for name in workers]):
        DataLoader(rows, batch_size=args.train_batch_size, **workers)
    with _explained("log", args, ["log_level", "log_level_replica"]):
        args.get_process_log_level()
    if args.torch_compile:
        with _explained("compiled model", args, ["torch_compile_backend", "torch_compile_mode"]):
            torch.compile(
                nn.Identity(), backend=args.torch_compile_backend or "inductor", mode=args.torch_compile_mode
            )
    with _explained("optimizer", args, OPTIMIZER):
        kind, options = Trainer.get_optimizer_cls_and_kwargs(args, cast(PreTrainedModel, model))
        if PREPARED & options.keys():  # made from the model's own modules
            return
        parameter = nn.Parameter(torch.zeros(2, 2, device=args.device))
        optimizer = kind([{"params": [parameter], "weight_decay": args.weight_decay}], **options)
    with _explained("learning rate schedule", args, SCHEDULE), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of a schedule that goes on without the optimizer
        warm_up = args.get_warmup_steps(args.max_steps)
        options = {"num_warmup_steps": warm_up, "num_training_steps": args.max_steps}
        given = cast(dict, args.lr_scheduler_kwargs)
        scheduler = get_scheduler(args.lr_scheduler_type, optimizer, **options, scheduler_specific_kwargs=given)
        if isinstance(scheduler, LambdaLR):
            scheduler.step()


@contextmanager
def _explained(what: str, args: RetentionTrainingArguments, names: Sequence[str]) -> Iterator[None]:
    try:
        yield
    except Exception as error:
        values = ", ".join(f"{name}={getattr(args, name)!r}" for name in names)
        problem = str(error) or type(error).__name__
        raise ValueError(f"No {what} can be made with these values: {problem} ({values}).") from error


def keep_differentiable(model: nn.Module) -> None:
    """Keeps 4-bit weights on a CPU in the form that gradients pass through.

    On CPUs with products of bfloat16, bitsandbytes packs a layer's weights at the first forward pass in eval mode, and
    its product with packed weights has no gradient: gates would learn from what is left.

    Raises:
        ValueError: if weights are packed already.
    """
    for name, module in model.named_modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            if getattr(module.weight.quant_state, "packing_format_for_cpu", False):
                raise ValueError(
                    f"{name} was packed for inference by a forward pass in eval mode, and no gradients pass through "
                    "packed weights: load the base again, and train before anything else."
                )
            module.support_avx512bf16_for_cpu = False


@torch.no_grad()
def check_packing(model: PeftModel) -> None:
    """Raises ValueError if the base attends across packed documents, which the student never does.

    Some modelling code leaves position_ids out of its masks. Two short documents show it: the teacher is compared with
    the undecayed attention of the gated layers, which keeps documents apart.
    """
    device = model.get_input_embeddings().weight.device
    half = torch.arange(8, device=device)[None]
    tokens = {"input_ids": torch.cat([half, half.flip(-1)], dim=1), "position_ids": torch.cat([half, half], dim=1)}
    options = {"use_cache": False, "last_hidden_state_only": True}
    with evaluating(model):
        with model.disable_adapter():
            teacher = model(**tokens, **options).float()  # [1, 16, C]
        with record(model, layerwise=True):
            apart = model(**tokens, **options).float()
    error = ((teacher - apart).norm() / teacher.norm()).item()
    # rounding gives 4e-7 in fp32 and up to 2e-2 in bf16; a leak gives 0.4 and more
    if error > 0.1:
        raise ValueError(
            f"{type(find_gated_model(model).model).__name__} attends across the documents of a packed row (relative "
            f"difference {error:.2f}), so that its forecasts are no target for gates that keep them apart: train with "
            "objective='layerwise', which does not need them."
        )
