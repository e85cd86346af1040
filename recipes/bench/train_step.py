"""One whole training step of the gates of a 4B model, against the same step of the model with no gates.

    python recipes/bench/train_step.py                             # T = 16,384; about 2 minutes on an H100 of 80 GB
    python recipes/bench/train_step.py --tokens 2048 --layers 4    # small

Random weights in Qwen3-4B's shape, bf16, gradient checkpointing. "ours" is RetentionTrainer's own step: teacher with
gates off, student forward and backward, both losses, clipping and the gates' optimiser step.
"plain" is the teacher forward, and forward and backward of the same model with no gates and SDPA, through the same
distillation loss; its gradient goes to the input embeddings. The goal: at most 1.25 times its time and 1.1 times its
peak memory.
"""

import argparse
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, get_peft_model
from torch import Tensor
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile
from transformers import AutoModelForCausalLM, Qwen3Config

from retention_gates import RetentionGateConfig, find_gated_model
from retention_gates.kernels.distill_loss import distill_loss
from retention_gates.recipes.bench.harness import Measurement, matrix_tflops, report, time_ms
from retention_gates.trainers.config import RetentionTrainingArguments
from retention_gates.trainers.output_head import OutputHead
from retention_gates.trainers.rows import RowCollator
from retention_gates.trainers.trainer import RetentionTrainer

SHAPE: dict[str, Any] = {
    "hidden_size": 2560,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "intermediate_size": 9728,
    "vocab_size": 151_936,
    "tie_word_embeddings": True,
}
MOST_TIME, MOST_MEMORY = 1.25, 1.1
# part -> the operators, as the profiler names them, under which it is launched
PARTS = {
    "attention (the teacher's too)": ("retention_gates::retention_attention", "aten::scaled_dot_product_attention"),
    "attention, backward": ("retention_gates::retention_attention_backward",),
    "retention sum": ("retention_gates::retention_sum",),
    "retention sum, backward": ("retention_gates::retention_sum_backward",),
    "distillation loss": ("retention_gates::distill_loss",),
}

Batch = dict[str, Tensor]


def make_model(device: str, dtype: torch.dtype, *, offload_checkpoints: bool = False, **shape: Any) -> PeftModel:
    """A model with random weights and gates, made where it stays, in training mode with gradient checkpointing."""
    with torch.device(device):
        base = AutoModelForCausalLM.from_config(Qwen3Config(**shape), dtype=dtype, attn_implementation="sdpa")
    model = get_peft_model(base, RetentionGateConfig())
    model.gradient_checkpointing_enable({"use_reentrant": False}, offload=offload_checkpoints)
    return model.train()


def make_batch(tokens: int, vocabulary: int, device: str) -> Batch:
    """One row, one document."""
    batch = RowCollator(tokens)([_row(torch.randint(vocabulary, (tokens,)))])
    return {name: batch[name].to(device) for name in batch.keys() - {"counts"}}


def _row(ids: Tensor) -> Batch:
    return {"input_ids": ids, "labels": ids, "position_ids": torch.arange(len(ids))}


def make_trainer(model: PeftModel, batch: Batch, folder: Path) -> RetentionTrainer:
    arguments = RetentionTrainingArguments(
        output_dir=str(folder),
        memory_size=512,
        report_to=[],
        save_strategy="no",
        disable_tqdm=True,
        use_cpu=batch["input_ids"].device.type == "cpu",
    )
    trainer = RetentionTrainer(model, arguments, [_row(batch["input_ids"][0].cpu())])
    trainer.create_optimizer()
    return trainer


def gated_step(trainer: RetentionTrainer, batch: Batch) -> Tensor:
    """Does what the trainer does in a step, with the loss that it logs."""
    optimizer = trainer.optimizer
    assert optimizer is not None
    loss = trainer.compute_loss(trainer.model, dict(batch))
    loss.backward()
    gates = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    torch.nn.utils.clip_grad_norm_(gates, trainer.args.max_grad_norm)
    optimizer.step()
    optimizer.zero_grad()
    return loss.detach()


def plain_step(model: PeftModel, head: OutputHead, batch: Batch) -> tuple[Tensor, Tensor]:
    """The loss, and the gradient of the input embeddings [1, T, C]."""
    tokens = {"position_ids": batch["position_ids"], "use_cache": False, "last_hidden_state_only": True}
    with model.disable_adapter():  # the backward pass too, which computes layers again
        with torch.no_grad():
            teacher = model(input_ids=batch["input_ids"], **tokens)
            embeddings = find_gated_model(model).model.get_input_embeddings()(batch["input_ids"])
        embeddings.requires_grad_()
        student = model(inputs_embeds=embeddings, **tokens)
        with head.weights() as (weight, _):
            loss = distill_loss(student[0], teacher[0], weight, batch["targets"][0]).total
        loss.backward()
    assert embeddings.grad is not None
    return loss.detach(), embeddings.grad


def least_ms(tokens: int, layers: int, tflops: float) -> float:
    """Matrix products at the device's rate: 4 passes over the layers (teacher, student, again, back), the head's."""
    hidden, heads, dim = SHAPE["hidden_size"], SHAPE["num_attention_heads"], SHAPE["head_dim"]
    projections = 2 * hidden * dim * (heads + SHAPE["num_key_value_heads"])
    weights = projections + 3 * hidden * SHAPE["intermediate_size"]
    attention = 2 * 2 * heads * dim * tokens * tokens / 2  # one forward pass; backward is 2.5 of them
    head = 3 * 2 * tokens * SHAPE["vocab_size"] * hidden
    return (layers * (4 * 2 * tokens * weights + (3 + 2.5) * attention) + head) / tflops / 1e9


def peak_memory(step: Callable[[], Any]) -> tuple[float, float]:
    """MiB at most: in all, and above what is there before the step."""
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    step()
    torch.cuda.synchronize()
    peak = torch.cuda.max_memory_allocated()
    return peak / 2**20, (peak - before) / 2**20


def device_ms(step: Callable[[], Any]) -> dict[str, float]:
    """Device time of one step in ms, by part; "whole" is all of it."""
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as recorded:
        step()
        torch.cuda.synchronize()
    times = dict.fromkeys(["whole", *PARTS], 0.0)
    for event in recorded.events():
        if event.device_type != DeviceType.CPU:
            if not event.is_user_annotation:
                times["whole"] += event.self_device_time_total / 1000
            continue
        part = _part_of(event.name)
        if part is not None and (event.cpu_parent is None or _part_of(event.cpu_parent.name) != part):
            times[part] += event.device_time_total / 1000
    return times


def _part_of(name: str) -> str | None:
    for part, operators in PARTS.items():
        if name in operators:
            return part
    # autograd's node carries the backend's name: ScaledDotProductCudnnAttentionBackward0
    return "attention, backward" if name.startswith("ScaledDotProduct") and "Backward" in name else None


def gates_ms(model: PeftModel, tokens: int) -> float:
    """All gates alone: forward, forward again for the backward pass, backward."""
    layers = find_gated_model(model).gated_layers
    gate = layers[0].active_gate
    assert gate is not None
    hidden = torch.randn(1, tokens, SHAPE["hidden_size"], device="cuda", dtype=torch.bfloat16, requires_grad=True)
    wanted = [hidden, *gate.parameters()]

    def run() -> None:
        with torch.no_grad():
            gate(hidden)
        torch.autograd.grad(gate(hidden).sum(), wanted)

    return len(layers) * time_ms(run, repeats=10)[0]


def show_parts(ours: dict[str, float], plain: dict[str, float], gates: float) -> None:
    print(f"\n{'device time in ms':30} {'ours':>8} {'share':>6} {'plain':>8} {'share':>6}")
    for part in ours:
        cells = (f"{times[part]:8.1f} {times[part] / max(times['whole'], 1e-9):6.1%}" for times in (ours, plain))
        print(f"{part:30} {' '.join(cells)}")
    print(f"{'gates, measured alone':30} {gates:8.1f} {gates / max(ours['whole'], 1e-9):6.1%}")


def compare(tokens: int, layers: int) -> None:
    case = f"Qwen3-4B shape, {layers} layers, T={tokens} bf16"
    model = make_model("cuda", torch.bfloat16, num_hidden_layers=layers, max_position_embeddings=tokens, **SHAPE)
    batch = make_batch(tokens, SHAPE["vocab_size"], "cuda")
    limit = least_ms(tokens, layers, matrix_tflops())
    plain = partial(plain_step, model, OutputHead.from_model(model), batch)
    with tempfile.TemporaryDirectory() as folder:
        ours = partial(gated_step, make_trainer(model, batch, Path(folder)), batch)
        rows, peaks, parts = [], [], []
        for contender, step in (("ours", ours), ("plain, SDPA", plain)):
            milliseconds, spread = time_ms(step, warmup=2, repeats=3)
            peak, above = peak_memory(step)
            peaks.append(peak)
            rows.append(Measurement(case, contender, milliseconds, "ms", spread, limit, above))
            parts.append(device_ms(step))
    report("train_step", rows)
    show_parts(parts[0], parts[1], gates_ms(model, tokens))
    time_ratio, memory_ratio = rows[0].value / rows[1].value, peaks[0] / peaks[1]
    print(f"\ntime:        {time_ratio:.3f} times plain (goal: at most {MOST_TIME})")
    print(
        f"peak memory: {memory_ratio:.3f} times plain (goal: at most {MOST_MEMORY}), MiB in all:", *map(round, peaks)
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=16_384)
    parser.add_argument("--layers", type=int, default=36)
    options = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("train_step measures device time and memory: it needs a CUDA GPU, and there is none here.")
    compare(options.tokens, options.layers)


if __name__ == "__main__":
    main()
