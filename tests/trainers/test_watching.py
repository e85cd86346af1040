"""Pictures of the gates, where time goes, and runs that are stopped."""

import json
import math
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tiny_training import gated, trainer_of

from retention_gates import find_gated_model
from retention_gates.trainers.phases import PhaseClock
from retention_gates.trainers.pictures import EDGES, Portrait, portray
from retention_gates.trainers.stop_if_diverged import TrainingDiverged, check_progress

ROW = torch.randint(3, 97, (48,), generator=torch.Generator().manual_seed(5))


def test_a_portrait_is_what_the_gates_say():
    model = gated()
    for layer in find_gated_model(model).gated_layers:  # a half-life of 2 ** 3 tokens, whatever the token
        layer.active_gate.output.weight.data.zero_()
        decay = math.log(2) / 8
        layer.active_gate.output.bias.data.fill_(-math.log(math.expm1(decay)))
    portrait = portray(model, ROW)
    kept = 4  # protected, as the config has it by default
    assert portrait.half_lives.sum() == 4 * 2 * (48 - kept)
    inside = portrait.half_lives[(EDGES[:-1] >= 2.5) & (EDGES[:-1] <= 3)]
    assert inside.sum() == portrait.half_lives.sum()
    mass = [kept + sum(2 ** (-(t - i) / 8) for i in range(kept, t + 1)) for t in range(24, 48)]
    np.testing.assert_allclose(portrait.retained_mass, np.full((4, 2), sum(mass) / 24), rtol=1e-4)


def test_the_map_is_brighter_where_more_is_kept():
    image = Portrait(np.array([[1.0, 100.0], [10.0, 0.0]]), np.zeros(len(EDGES) - 1)).heat_map()
    assert image.shape == (24, 240, 3) and image.dtype == np.uint8
    light = image.astype(int).sum(-1)
    assert light[0, 120] > light[12, 0] > light[0, 0] > light[12, 120]
    assert (light[:12, :120] == light[0, 0]).all() and (light[12:, 120:] == light[12, 120]).all()


@pytest.mark.parametrize(("layers", "heads", "width"), [(30, 3, 240), (36, 8, 240), (16, 32, 384), (1, 1, 240)])
def test_the_map_is_wide_enough_to_be_seen(layers, heads, width):
    assert Portrait(np.ones((layers, heads)), np.zeros(len(EDGES) - 1)).heat_map().shape == (12 * layers, width, 3)


def test_tensorboard_gets_scalars_and_pictures(tmp_path: Path):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    trainer = trainer_of(
        tmp_path, eval_rows=ROW[None], report_to=["tensorboard"], eval_strategy="steps", eval_steps=3, max_steps=3
    )
    trainer.train()
    (events,) = (tmp_path / "out").rglob("events.out.tfevents.*")
    found = accumulator.EventAccumulator(str(events)).Reload()
    tags = found.Tags()
    assert "retained_mass" in tags["images"] and "log2_half_life" in tags["histograms"]
    names = ("train/forward_kl", "train/retained_mass/layer_00", "eval/kl_8", "train/tokens_per_second")
    assert {*names, "train/time/forward_and_backward", "train/memory/process_peak_gib"} <= set(tags["scalars"])
    line = next(line for line in trainer.state.log_history if "loss" in line)
    shares = [value for key, value in line.items() if key.startswith("time/")]
    assert sum(shares) == pytest.approx(1, abs=0.01) and line["time/forward_and_backward"] > 0


def test_a_phase_inside_another_counts_once():
    clock = PhaseClock()
    with clock.phase("outer"), clock.phase("inner"):
        time.sleep(0.05)
    time.sleep(0.05)
    shares = clock.shares()
    assert set(shares) == {"time/outer", "time/other"}
    assert sum(shares.values()) == pytest.approx(1) and 0.2 < shares["time/outer"] < 0.8


@pytest.mark.parametrize(
    "logs, said",
    [
        ({"loss": math.nan}, "loss is nan"),
        ({"loss": 1.0, "grad_norm": math.inf}, "grad_norm is inf"),
        ({"loss": 4.1}, "the loss is 4.1 and was 0.4"),
    ],
)
def test_a_run_that_goes_wrong_is_stopped(tmp_path: Path, logs: dict, said: str):
    history = [{"loss": 3.0}, {"eval_kl_8": 9.0}, {"loss": 0.4}]
    with pytest.raises(TrainingDiverged, match=f"At step 7 {said}: the run stops. No checkpoint"):
        check_progress(7, logs, history, ratio=10.0, output_dir=tmp_path)
    check_progress(7, {"loss": 3.9, "grad_norm": 1.0}, history, ratio=10.0, output_dir=tmp_path)
    check_progress(7, {"loss": 2.9}, [{"loss": 3.0}, {"loss": 0.01}], ratio=10.0, output_dir=tmp_path)


@pytest.mark.parametrize("logging_steps", [1, 6])
def test_the_last_good_checkpoint_is_named_and_no_bad_one_written(tmp_path: Path, logging_steps: int):
    trainer = trainer_of(tmp_path, logging_steps=logging_steps, save_steps=2)
    original = trainer._objective

    def poisoned(model, inputs):
        loss, terms = original(model, inputs)
        is_third = trainer.state.global_step == 2 and torch.is_grad_enabled()
        return (loss * math.nan if is_third else loss), terms

    trainer._objective = poisoned
    with pytest.raises(TrainingDiverged, match=r"At step [34] .*The last good checkpoint is .*checkpoint-2\."):
        trainer.train()
    assert [path.name for path in (tmp_path / "out").glob("checkpoint-*")] == ["checkpoint-2"]
    lines = [json.loads(line) for line in (tmp_path / "out" / "log.jsonl").read_text().splitlines()]
    assert all(math.isfinite(line["loss"]) for line in lines)


@pytest.mark.parametrize("rate", [1e30, 1e20])
@pytest.mark.parametrize("objective", ["layerwise", "end_to_end"])
def test_an_update_that_ruins_the_gates_is_not_saved(tmp_path: Path, rate: float, objective: str):
    """The loss of its own step does not show it, and each save would remove the checkpoint before."""
    options = {"save_steps": 1, "save_total_limit": 1, "warmup_steps": 1, "objective": objective}
    trainer = trainer_of(tmp_path, learning_rate=rate, **options)
    said = r"At step 2 the update made a loss of .* out of .*checkpoint-1\..*lower learning_rate"
    with pytest.raises(TrainingDiverged, match=said):
        trainer.train()
    assert [path.name for path in (tmp_path / "out").glob("checkpoint-*")] == ["checkpoint-1"]
    saved = load_file(tmp_path / "out" / "checkpoint-1" / "adapter_model.safetensors")
    assert all(tensor.abs().max() < 100 for tensor in saved.values())


def test_the_last_update_of_a_run_that_saves_nothing_is_looked_at(tmp_path: Path):
    trainer = trainer_of(tmp_path, save_strategy="no", learning_rate=1e30, max_steps=2, warmup_steps=1)
    with pytest.raises(TrainingDiverged, match="At step 2 the update made a loss of nan"):
        trainer.train()


def test_looking_at_an_update_changes_nothing(tmp_path: Path):
    weights = []
    for save_steps in (1, 6):
        trainer = trainer_of(tmp_path / str(save_steps), gated(), save_steps=save_steps, gradient_accumulation_steps=2)
        trainer.train()
        weights.append({name: p.detach().clone() for name, p in trainer.model.named_parameters() if p.requires_grad})
    assert all((weights[0][name] == other).all() for name, other in weights[1].items())


@pytest.mark.parametrize("spoilt", ["loss", "gradient"])
@pytest.mark.parametrize("is_filtered", [False, True])
def test_a_step_without_numbers_is_not_taken(tmp_path: Path, spoilt: str, is_filtered: bool):
    """transformers' filter logs the mean of the losses before in its place."""
    trainer = trainer_of(tmp_path, logging_nan_inf_filter=is_filtered, logging_steps=6, save_steps=6)
    original, seen = trainer._objective, {}

    def poisoned(model, inputs):
        loss, terms = original(model, inputs)
        if trainer.state.global_step == 2:
            seen.update({name: p.detach().clone() for name, p in trainer.model.named_parameters() if p.requires_grad})
            if spoilt == "loss":
                loss = loss * math.nan
            else:
                loss.register_hook(lambda gradient: gradient * math.inf)
        return loss, terms

    trainer._objective = poisoned
    with pytest.raises(TrainingDiverged, match=r"At step 3 the gradient's norm is (nan|inf)"):
        trainer.train()
    assert trainer.state.global_step == 2 and seen
    assert all((p == seen[name]).all() for name, p in trainer.model.named_parameters() if p.requires_grad)


@pytest.mark.parametrize("name", ["forward_kl", "next_token_loss", "layer_error", "capacity_loss"])
def test_parts_of_the_loss_are_looked_at_where_a_filter_hides_the_whole(tmp_path: Path, name: str):
    with pytest.raises(TrainingDiverged, match=f"At step 7 {name} is nan"):
        check_progress(7, {"loss": 0.0, name: math.nan}, [], ratio=10.0, output_dir=tmp_path)
