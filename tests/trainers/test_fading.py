"""How keys fade while gates are trained: by the square of age, and as for several sizes of memory."""

from pathlib import Path

import pytest
import torch
from tiny_training import Rows, arguments, batch_of, gated, trainer_of

import retention_gates.gates.attention.interface as attention
from retention_gates import find_gated_model, record
from retention_gates.gates.attention.fading import Fading
from retention_gates.trainers.rows import RowCollator, row_shares

SQUARED = {"fade": "gaussian", "largest_memory_size": 32}  # memory_size is 8


def step(trainer, inputs):
    trainer.model.zero_grad()
    trainer.current_gradient_accumulation_steps = 1
    loss = trainer.training_step(trainer.model, dict(inputs))
    return loss, {n: p.grad.clone() for n, p in trainer.model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("objective", ["end_to_end", "layerwise"])
def test_rows_are_seen_longer_than_their_gates_say(tmp_path: Path, monkeypatch, objective: str):
    trainer = trainer_of(tmp_path, objective=objective, gradient_checkpointing=None, **SQUARED)
    inputs = batch_of(trainer)
    attend, seen = attention.retention_attention, []

    def spy(*tensors, **options):
        seen.append((tensors[3].detach(), options["gaussian"]))
        return attend(*tensors, **options)

    monkeypatch.setattr(attention, "retention_attention", spy)
    step(trainer, inputs)
    with torch.no_grad(), record(trainer.model) as recording:
        trainer.model(**{k: inputs[k] for k in ("input_ids", "position_ids")}, use_cache=False)
    stretch = inputs["stretch"]
    assert stretch.unique().numel() > 1 and stretch.min() >= 1 and stretch.max() <= 4
    log_beta, is_gaussian = seen[0]  # of the first layer, whose hidden states nothing has changed
    assert is_gaussian
    torch.testing.assert_close(log_beta * stretch[:, None, None], recording.log_beta[0])
    assert not seen[-1][1]  # outside of a step nothing is left of it


def test_every_gate_learns_whatever_fades(tmp_path: Path):
    losses = {}
    for fade in ("exponential", "gaussian"):
        trainer = trainer_of(tmp_path / fade, fade=fade, capacity_weight=0.0)
        losses[fade], found = step(trainer, batch_of(trainer))
        assert all(gradient.abs().sum() > 0 for gradient in found.values())
    assert losses["exponential"] != losses["gaussian"]


def test_recomputed_layers_fade_as_they_did(tmp_path: Path):
    with_it, without = trainer_of(tmp_path, **SQUARED), trainer_of(tmp_path, gradient_checkpointing=False, **SQUARED)
    with_it.model.gradient_checkpointing_enable({"use_reentrant": False})
    with_it.model.train()
    inputs = batch_of(with_it)
    _, expected = step(without, inputs)
    _, found = step(with_it, inputs)
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, expected[name], msg=name)


def test_a_row_is_stretched_alike_in_any_batch_and_part():
    rows = [Rows()[i] for i in range(4)]
    together = RowCollator(None, longest=8.0)(rows)["stretch"]
    for part in range(2):
        alone = [RowCollator(None, part, 2, longest=8.0)([row])["stretch"] for row in rows]
        assert torch.equal(torch.cat(alone), together)
    assert "stretch" not in RowCollator(None)(rows)


def test_shares_are_spread_evenly():
    ids = torch.randint(50_000, (4000, 64), generator=torch.Generator().manual_seed(0))
    counts = torch.histc(row_shares(ids), 10, 0, 1)
    assert counts.sum() == 4000 and counts.min() > 300


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"fade": "gauss"}, "fade='gauss' is not one of exponential, gaussian; the nearest is 'gaussian'"),
        ({"largest_memory_size": 4}, "largest_memory_size=4 is below memory_size=8"),
        ({"largest_memory_size": 8.5}, "largest_memory_size=8.5 must be a whole number"),
    ],
)
def test_bad_values_are_named(tmp_path: Path, change, match: str):
    with pytest.raises(ValueError, match=match):
        arguments(tmp_path, **change)


def test_layers_fade_as_before_after_an_error():
    model = find_gated_model(gated())
    before = [layer.fading for layer in model.gated_layers]
    with pytest.raises(RuntimeError), model.fading_as(Fading(gaussian=True)):
        raise RuntimeError
    assert all(layer.fading is its_own for layer, its_own in zip(model.gated_layers, before, strict=True))
