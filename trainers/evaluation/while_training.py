"""Scores of rows under real eviction, as a training run logs them."""

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from peft import PeftModel

from retention_gates.gates.adapter.model import find_gated_model
from retention_gates.gates.adapter.modes import temporarily
from retention_gates.trainers.calibration import measure_shares
from retention_gates.trainers.config import EVAL_METRICS, RetentionTrainingArguments
from retention_gates.trainers.distributed.layout import engine_of
from retention_gates.trainers.evaluation.contenders import Contender
from retention_gates.trainers.evaluation.text import compare_rows


def score_rows(
    model: PeftModel, rows: torch.Tensor, args: RetentionTrainingArguments, accelerator: Accelerator
) -> dict[str, float]:
    """Means over rows [R, T] for each of eval_memory_sizes: `kl_64`. Every rank has to call with all rows."""
    # a sharded model is put together from all ranks in each pass: they pass through the same rows
    is_sharded = engine_of(args) != "replicated"
    mine = rows if is_sharded else rows[accelerator.process_index :: accelerator.num_processes]
    contenders = [Contender("retention", size, args.eval_budgets) for size in args.eval_memory_sizes]
    config = find_gated_model(model).active_config
    measured = measure_shares(model, rows) if args.eval_budgets == "calibrated" else None
    with temporarily([config], budget_shares=measured or config.budget_shares):
        records = compare_rows(model, mine, contenders, batch_size=args.per_device_eval_batch_size)
    if accelerator.num_processes > 1 and not is_sharded:
        records = gather_object(records)
    metrics: dict[str, float] = {}
    for size in args.eval_memory_sizes:
        scores = [record for record in records if record["memory_size"] == size]
        for name in EVAL_METRICS:
            metrics[f"{name}_{size}"] = sum(score[name] for score in scores) / len(scores)
    return metrics
