"""The objective against its formula, what is trained and what a run tells."""

import json
import math
from pathlib import Path

import pytest
import torch
from tiny_training import Rows, batch_of, gated, trainer_of

from retention_gates import find_gated_model, record
from retention_gates.kernels.retention_attention import retention_attention
from retention_gates.trainers.evaluation.contenders import Contender
from retention_gates.trainers.evaluation.text import compare_rows
from retention_gates.trainers.losses import capacity_loss
from retention_gates.trainers.trainer import RetentionTrainer


def gradients(trainer: RetentionTrainer, inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    trainer.model.zero_grad()
    trainer.compute_loss(trainer.model, dict(inputs)).backward()
    return {n: p.grad.clone() for n, p in trainer.model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("family", ["llama", "gemma2", "granite", "cohere2"])  # plain, softcapped and scaled logits
def test_end_to_end_is_kl_plus_next_token_plus_capacity(tmp_path: Path, family: str):
    changes = {"attn_implementation": "eager"} if family == "gemma2" else {}
    weights = {"kl_weight": 0.7, "next_token_weight": 0.3, "capacity_weight": 2.0}
    trainer = trainer_of(tmp_path, gated(family, **changes), loss_chunk_size=7, **weights)
    inputs = batch_of(trainer)
    loss = trainer.compute_loss(trainer.model, dict(inputs))

    model, tokens = trainer.model, {k: inputs[k] for k in ("input_ids", "position_ids")}
    with torch.no_grad(), model.disable_adapter():
        teacher = model(**tokens, use_cache=False).logits.log_softmax(-1)
    with torch.no_grad(), record(model) as recording:
        student = model(**tokens, use_cache=False).logits.log_softmax(-1)
    within = [t for t in range(47) if t != 29]  # position 29 ends the first document, 47 the row
    kl = (teacher.exp() * (teacher - student)).sum(-1)[:, within].mean()
    following = inputs["input_ids"][:, [t + 1 for t in within]]
    cross_entropy = -student[:, within].gather(-1, following[..., None]).mean()
    capacity = capacity_loss(recording.log_beta, 8, document_ids=recording.document_ids).loss
    assert kl > 1e-4 and capacity > 1e-2
    assert loss.item() == pytest.approx((0.7 * kl + 0.3 * cross_entropy + 2.0 * capacity).item(), rel=1e-4)


def test_layerwise_is_the_mean_layer_error_plus_capacity(tmp_path: Path):
    trainer = trainer_of(tmp_path, objective="layerwise", kl_weight=3.0, capacity_weight=0.5)
    inputs = batch_of(trainer)
    loss = trainer.compute_loss(trainer.model, dict(inputs))
    tokens = {k: inputs[k] for k in ("input_ids", "position_ids")}
    with torch.no_grad(), record(trainer.model, layerwise=True) as recording:
        trainer.model(**tokens, use_cache=False)
    capacity = capacity_loss(recording.log_beta, 8, document_ids=recording.document_ids).loss
    expected = 3.0 * torch.stack(recording.layer_losses).mean() + 0.5 * capacity
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)


def test_layerwise_sends_no_gradient_through_the_model(tmp_path: Path):
    trainer = trainer_of(tmp_path, objective="layerwise")
    seen = []
    for layer in find_gated_model(trainer.model).model.model.layers:
        layer.register_forward_hook(lambda module, inputs, output: seen.append((inputs[0], output)))
    assert all(gradient.abs().max() > 0 for gradient in gradients(trainer, batch_of(trainer)).values())
    assert len(seen) == 4 and not any(t.requires_grad for pair in seen for t in pair)


def test_documents_are_worked_out_once_for_all_layers(tmp_path: Path, monkeypatch):
    trainer = trainer_of(tmp_path)
    assert trainer._output_head  # whose check is a pass of its own
    seen = []

    def attention(*arguments, document_ids, **options):
        seen.append(document_ids)
        return retention_attention(*arguments, document_ids=document_ids, **options)

    monkeypatch.setattr("retention_gates.gates.attention.interface.retention_attention", attention)
    for inputs in (batch_of(trainer), batch_of(trainer)):
        trainer.compute_loss(trainer.model, inputs).backward()
    assert len(seen) == 2 * 4
    assert len({id(documents) for documents in seen}) == 2 and seen[0] is not seen[-1]


@pytest.mark.parametrize("objective", ["end_to_end", "layerwise"])
def test_a_gate_that_is_not_a_number_stops_the_step(tmp_path: Path, objective: str):
    trainer = trainer_of(tmp_path, objective=objective)
    find_gated_model(trainer.model).gated_layers[2].active_gate.output.bias.data.fill_(math.nan)
    with pytest.raises(ValueError, match="log_beta must be finite and <= 0"):
        trainer.compute_loss(trainer.model, batch_of(trainer))


@pytest.mark.parametrize("objective", ["end_to_end", "layerwise"])
def test_a_packed_row_is_its_documents_apart(tmp_path: Path, objective: str):
    trainer = trainer_of(tmp_path, objective=objective, capacity_weight=0.0)
    tokens = trainer.train_dataset[0]
    others = {name: column.clone() for name, column in tokens.items()}
    others["input_ids"][:30] = others["labels"][:30] = torch.randint(3, 97, (30,))
    parts = [{name: column[where] for name, column in tokens.items()} for where in (slice(30), slice(30, None))]
    row, changed, first, apart = (trainer.data_collator([part]) for part in (tokens, others, *parts))
    model = trainer.model
    for inputs in (row, changed):
        with torch.no_grad(), record(model) as recording:
            model(input_ids=inputs["input_ids"], position_ids=inputs["position_ids"], use_cache=False)
        with torch.no_grad(), record(model) as alone:
            model(input_ids=apart["input_ids"], position_ids=apart["position_ids"], use_cache=False)
        for packed, single in zip(recording.log_beta, alone.log_beta, strict=True):
            torch.testing.assert_close(packed[..., 30:], single)
    if objective == "end_to_end":  # 29 and 17 forecasts inside the two documents
        losses = [trainer.compute_loss(model, dict(inputs)).item() for inputs in (row, first, apart)]
        assert losses[0] == pytest.approx((29 * losses[1] + 17 * losses[2]) / 46, rel=1e-5)


@pytest.mark.gpu
def test_checkpoints_in_the_memory_of_the_cpu_change_no_gradient(tmp_path: Path):
    trainer = trainer_of(tmp_path, use_cpu=False)
    batch = batch_of(trainer)
    inputs = {name: batch[name].cuda() for name in batch.keys() - {"counts"}}
    there = {}
    for offload in (False, True):
        trainer.model.gradient_checkpointing_enable({"use_reentrant": False}, offload=offload)
        trainer.model.train()
        there[offload] = gradients(trainer, inputs)
    assert there[True].keys() == there[False].keys()
    assert all(torch.equal(there[True][name], gradient) for name, gradient in there[False].items())


def test_gradient_checkpointing_changes_no_gradient(tmp_path: Path):
    with_it, without = trainer_of(tmp_path), trainer_of(tmp_path, gradient_checkpointing=False)
    assert with_it.args.gradient_checkpointing and not without.args.gradient_checkpointing
    with_it.model.gradient_checkpointing_enable({"use_reentrant": False})
    with_it.model.train()
    inputs = batch_of(with_it)
    expected = gradients(without, inputs)
    for name, gradient in gradients(with_it, inputs).items():
        torch.testing.assert_close(gradient, expected[name], msg=name)


def test_dropout_of_the_base_stays_off(tmp_path: Path):
    model = gated("phi3", resid_pdrop=0.5)
    for layer in find_gated_model(model).gated_layers:
        layer.active_gate.output.bias.data.fill_(25.0)  # nothing decays: teacher and student are one
    trainer = trainer_of(tmp_path, model)
    model.train()
    trainer.compute_loss(model, batch_of(trainer))
    assert trainer._averages.drain(trainer.accelerator)["forward_kl"] < 1e-6


@pytest.mark.parametrize("objective", ["end_to_end", "layerwise"])
def test_training_changes_the_gates_and_nothing_else(tmp_path: Path, objective: str):
    trainer = trainer_of(tmp_path, objective=objective, max_steps=25, learning_rate=0.02, save_strategy="no")
    before = {name: parameter.clone() for name, parameter in trainer.model.named_parameters()}
    trainer.train()
    optimised = {id(p) for group in trainer.optimizer.param_groups for p in group["params"]}
    for name, parameter in trainer.model.named_parameters():
        is_gate = ".retention_gate.default." in name
        assert (id(parameter) in optimised) == is_gate, name
        assert torch.equal(parameter, before[name]) != is_gate, name
    steps = [line for line in trainer.state.log_history if "loss" in line]
    assert steps[-1]["capacity_loss"] < 0.7 * steps[0]["capacity_loss"]
    assert steps[-1]["retained_mass"] < steps[0]["retained_mass"]


def test_logs_are_means_over_the_steps_between_them(tmp_path: Path):
    logs = []
    for steps in (1, 3):
        trainer = trainer_of(tmp_path / str(steps), gated(), logging_steps=steps, save_strategy="no")
        trainer.train()
        lines = [json.loads(line) for line in (tmp_path / str(steps) / "out" / "log.jsonl").open()]
        logs.append([line for line in lines if "loss" in line])
    terms = {"loss", "forward_kl", "next_token_loss", "capacity_loss", "retained_mass", "log_half_life", "grad_norm"}
    layers = {f"retained_mass/layer_0{i}" for i in range(4)}
    assert terms | layers | {"tokens_per_second", "learning_rate", "step"} <= logs[0][0].keys()
    assert [line["step"] for line in logs[1]] == [3, 6]
    for name in terms - {"grad_norm"} | layers:
        mean = sum(line[name] for line in logs[0][:3]) / 3
        assert logs[1][0][name] == pytest.approx(mean, rel=1e-5), name
    line = logs[0][0]
    assert line["retained_mass"] == pytest.approx(sum(line[name] for name in layers) / 4, rel=1e-6)
    parts = line["forward_kl"] + line["next_token_loss"] + line["capacity_loss"]
    assert line["loss"] == pytest.approx(parts, rel=1e-5)
    assert math.log(2) < line["log_half_life"] < math.log(200)  # the gates begin around 20 tokens


def test_the_progress_line_leaves_out_what_is_per_layer(tmp_path: Path, capsys: pytest.CaptureFixture):
    trainer_of(tmp_path, max_steps=2, disable_tqdm=False, save_strategy="no").train()
    shown = capsys.readouterr()
    assert "capacity_loss" in shown.out + shown.err and "layer_00" not in shown.out + shown.err


@pytest.mark.parametrize("budgets", ["uniform", "calibrated"])
def test_evaluation_is_under_real_eviction(tmp_path: Path, budgets: str):
    rows = torch.randint(3, 97, (3, 40), generator=torch.Generator().manual_seed(5))
    trainer = trainer_of(
        tmp_path,
        eval_rows=rows,
        eval_strategy="steps",
        eval_steps=3,
        eval_memory_sizes=[6, 16],
        eval_budgets=budgets,
        per_device_eval_batch_size=2,
        max_steps=3,
    )
    trainer.train()
    logged = [line for line in trainer.state.log_history if "eval_kl_6" in line]
    assert [line["step"] for line in logged] == [3]
    metrics = trainer.evaluate()
    config = find_gated_model(trainer.model).active_config
    assert config.budget_shares is None
    if budgets == "uniform":
        for size in (6, 16):
            records = compare_rows(trainer.model, rows, [Contender("retention", size, budgets)])
            records = [record for record in records if record["memory_size"] == size]
            assert len(records) == 3
            for name in ("kl", "nll", "full_nll", "agreement"):
                expected = sum(record[name] for record in records) / 3
                assert metrics[f"eval_{name}_{size}"] == pytest.approx(expected, rel=1e-5)
    assert metrics["eval_kl_6"] == pytest.approx(logged[0]["eval_kl_6"], rel=1e-6)
    assert metrics["eval_kl_6"] > metrics["eval_kl_16"] > 0


@pytest.mark.parametrize("objective", ["end_to_end", "layerwise"])
def test_gates_of_a_bf16_base_train_in_fp32(tmp_path: Path, objective: str):
    same_row = [Rows()[0]] * 16  # so that the loss of one step can be compared with another's
    options = {"objective": objective, "learning_rate": 1e-2, "save_strategy": "no"}
    trainer = trainer_of(tmp_path, gated(dtype=torch.bfloat16), same_row, **options)
    assert {p.dtype for p in find_gated_model(trainer.model).model.lm_head.parameters()} == {torch.bfloat16}
    trainer.train()
    steps = [line for line in trainer.state.log_history if "loss" in line]
    assert steps[-1]["capacity_loss"] < steps[0]["capacity_loss"] and all(math.isfinite(s["loss"]) for s in steps)
    assert {p.dtype for group in trainer.optimizer.param_groups for p in group["params"]} == {torch.float32}


def test_tensorboard_gets_the_mass_of_every_layer(tmp_path: Path):
    events = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    trainer_of(tmp_path, max_steps=2, save_strategy="no", report_to=["tensorboard"]).train()
    (folder,) = (tmp_path / "out" / "runs").iterdir()
    scalars = events.EventAccumulator(str(folder)).Reload()
    assert {f"train/retained_mass/layer_0{i}" for i in range(4)} <= set(scalars.Tags()["scalars"])
    assert [event.step for event in scalars.Scalars("train/retained_mass/layer_00")] == [1, 2]
