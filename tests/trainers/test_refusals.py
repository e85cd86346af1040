"""Models, rows and arguments that no gates can be trained with."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from tiny_models import tiny_model
from tiny_training import Rows, arguments, gated, trainer_of

from retention_gates import find_gated_model
from retention_gates.trainers.checks import keep_differentiable
from retention_gates.trainers.trainer import RetentionTrainer


def frozen_gates():
    model = gated()
    model.requires_grad_(False)
    return model


def open_base():
    model = gated()
    find_gated_model(model).model.lm_head.weight.requires_grad_(True)
    return model


def bf16_gates():
    model = gated()
    gate = find_gated_model(model).gated_layers[0].active_gate
    gate.output.weight.data = gate.output.weight.data.bfloat16()
    return model


@pytest.mark.parametrize(
    "make_model, match",
    [
        (tiny_model, "has no retention gates"),
        (lambda: gated().base_model, "must be a PeftModel"),
        (frozen_gates, "is_trainable=True"),
        (open_base, r"lm_head.weight would be trained"),
        (bf16_gates, "torch.bfloat16, which would lose every update"),
    ],
)
def test_a_model_whose_gates_cannot_be_trained_is_refused(tmp_path: Path, make_model, match: str):
    with pytest.raises(ValueError, match=match):
        trainer_of(tmp_path, make_model())
    assert not (tmp_path / "out").exists()


def test_a_base_that_does_not_keep_packed_documents_apart_trains_layer_by_layer_only(tmp_path: Path):
    with pytest.raises(ValueError, match="attends across the documents of a packed row"):
        trainer_of(tmp_path, gated("gpt_oss"))
    trainer = trainer_of(tmp_path, gated("gpt_oss"), objective="layerwise", max_steps=2, save_strategy="no")
    trainer.train()
    assert trainer.state.global_step == 2


@pytest.mark.parametrize(
    "rows, match",
    [
        (Rows(0), "train_dataset is empty"),
        (Rows(positions=torch.arange(513)), "513 tokens, the model has 512 positions"),
        (Rows(labels=torch.full((48,), -100)), "has no target"),
        (Rows(positions=torch.zeros(48, dtype=torch.long)), "has no target"),  # 48 documents of one token
        (Rows(labels=torch.arange(3)), "differ in length"),
        ([{"labels": torch.arange(4)}], r"has the columns \['labels'\], but no input_ids: .*pack_rows"),
        ([{"input_ids": torch.ones(4)}], r"input_ids of torch.float32 \[4\]"),
        ([{"input_ids": torch.ones(1, 4, dtype=torch.long)}], r"input_ids of torch.int64 \[1, 4\]"),
    ],
)
def test_rows_that_cannot_be_trained_on_are_refused(tmp_path: Path, rows, match: str):
    with pytest.raises(ValueError, match=match):
        RetentionTrainer(gated(), arguments(tmp_path), rows)
    assert not (tmp_path / "out").exists()


def test_evaluation_rows_longer_than_the_models_positions_are_refused(tmp_path: Path):
    with pytest.raises(ValueError, match="Rows of 513 tokens are longer than the model's 512 positions"):
        RetentionTrainer(gated(), arguments(tmp_path), Rows(), eval_dataset=torch.ones(2, 513, dtype=torch.long))
    assert not (tmp_path / "out").exists()


def test_a_later_row_without_a_target_is_refused(tmp_path: Path):
    rows = [Rows()[i] for i in range(12)]
    rows[5]["labels"] = torch.full((48,), -100)
    with pytest.raises(ValueError, match="has no target"):
        trainer_of(tmp_path, rows=rows).train()


@pytest.mark.parametrize(
    "changes, match",
    [
        ({"objective": "layer_wise"}, "objective='layer_wise'.*nearest is 'layerwise'"),
        ({"memory_size": 0}, "memory_size=0 must be a whole number, 1 or more"),
        ({"memory_size": 64.0}, "memory_size=64.0 must be a whole number"),
        ({"memory_size": True}, "memory_size=True must be a whole number"),
        ({"memory_size": 4}, "memory_size=4 leaves no room beside 4 protected tokens: at least 5"),
        ({"eval_memory_sizes": [8, 3]}, "eval_memory_sizes=3 leaves no room"),
        ({"eval_memory_sizes": []}, "leaves nothing to evaluate"),
        ({"learning_rate": -1.0}, "learning_rate=-1.0"),
        ({"learning_rate": float("nan")}, "learning_rate=nan"),
        ({"eval_budgets": "globl"}, "eval_budgets='globl'"),
        ({"capacity_normalisation": "lengths"}, "nearest is 'length'"),
        ({"capacity_weight": float("nan")}, "capacity_weight=nan"),
        ({"kl_weight": -1.0}, "kl_weight=-1.0"),
        ({"kl_weight": 0.0, "next_token_weight": 0.0}, "only forgetting"),
        ({"objective": "layerwise", "next_token_weight": 1.0}, "needs objective='end_to_end'"),
        ({"objective": "layerwise", "gradient_checkpointing": True}, "nothing to recompute"),
        ({"ddp_find_unused_parameters": True}, "take gates for unused"),
        ({"label_smoothing_factor": 0.1}, "label_smoothing_factor=0.1 is not for training gates"),
        ({"save_only_model": True}, "save_only_model"),
        ({"ignore_data_skip": True}, "ignore_data_skip=True is not for training gates: a resumed run"),
        ({"num_train_epochs": 5}, "num_train_epochs=5 would be ignored, since max_steps=6 decides"),
        ({"load_best_model_at_end": True}, "metric_for_best_model=None, which no evaluation measures"),
        (
            {"load_best_model_at_end": True, "metric_for_best_model": "eval_kl_9", "eval_memory_sizes": [8, 16]},
            "metric_for_best_model='eval_kl_9'.*one of kl_8, kl_16, nll_8",
        ),
    ],
)
def test_arguments_that_no_run_can_use_are_refused(tmp_path: Path, changes: dict, match: str):
    with pytest.raises(ValueError, match=match):
        trainer_of(tmp_path, **changes)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("metric", ["kl_16", "eval_full_nll_8", "agreement_8"])
def test_every_measured_score_can_choose_the_best_checkpoint(tmp_path: Path, metric: str):
    best = {"load_best_model_at_end": True, "metric_for_best_model": metric, "eval_strategy": "steps"}
    args = arguments(tmp_path, eval_memory_sizes=[8, 16], save_steps=2, eval_steps=2, **best)
    assert args.greater_is_better is ("agreement" in metric)


def test_packed_4_bit_weights_have_no_gradient():
    """As bitsandbytes has them on some CPUs."""
    model = gated()
    layer = find_gated_model(model).model.lm_head
    layer.support_avx512bf16_for_cpu = True
    layer.weight.quant_state = SimpleNamespace()
    keep_differentiable(model)
    assert not layer.support_avx512bf16_for_cpu
    layer.weight.quant_state.packing_format_for_cpu = True
    with pytest.raises(ValueError, match="lm_head was packed for inference .* load the base again"):
        keep_differentiable(model)
