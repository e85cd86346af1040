"""What is changed for a while is put back, also where an error ends it."""

from types import SimpleNamespace

import pytest
import torch
from tiny_training import Rows, batch_of, gated, trainer_of

from retention_gates import BoundedCache, find_gated_model
from retention_gates.trainers import calibration, checks, pictures, trainer
from retention_gates.trainers.calibration import measure_shares
from retention_gates.trainers.distributed.sequence_parallel import RowGroups
from retention_gates.trainers.evaluation import answers, text, while_training
from retention_gates.trainers.evaluation.contenders import Contender

ROWS = torch.randint(3, 97, (2, 40), generator=torch.Generator().manual_seed(0))
SHARES = [[1.0, 2.0]] * 4


class Broken(RuntimeError):
    pass


def broken(*args, **kwargs):
    raise Broken


def mixed_modes():
    """A model in training mode but for one part, as a caller may keep its dropout."""
    model = gated().train()
    kept = find_gated_model(model).model.get_decoder().layers[1]
    kept.eval()
    return model, kept


def assert_as_before(model, kept):
    modes = {module.training for module in kept.modules()}
    assert modes == {False} and model.training
    assert find_gated_model(model).model.get_decoder().layers[0].mlp.training


@pytest.mark.parametrize("fails", [False, True])
@pytest.mark.parametrize("what", ["calibration", "portrait", "packing", "text"])
def test_modes(what, fails, monkeypatch):
    model, kept = mixed_modes()
    calls = {
        "calibration": (calibration, lambda: measure_shares(model, ROWS)),
        "portrait": (pictures, lambda: pictures.portray(model, ROWS[0])),
        "packing": (checks, lambda: checks.check_packing(model)),
        "text": (text, lambda: text.compare_rows(model, ROWS, [Contender("retention", 8, "uniform")])),
    }
    module, call = calls[what]
    if fails:
        monkeypatch.setattr(module, "record" if what != "text" else "_score_text", broken)
        with pytest.raises(Broken):
            call()
    else:
        call()
    assert_as_before(model, kept)


@pytest.mark.parametrize("fails", [False, True])
def test_shares_of_an_evaluation(tmp_path, fails, monkeypatch):
    model = gated()
    one = trainer_of(tmp_path, model, Rows(), ROWS, eval_budgets="calibrated")
    config = find_gated_model(model).active_config
    config.budget_shares = SHARES
    if fails:
        monkeypatch.setattr(while_training, "compare_rows", broken)
        with pytest.raises(Broken):
            one.evaluate()
    else:
        assert "eval_kl_8" in one.evaluate()
    assert config.budget_shares is SHARES


@pytest.mark.parametrize("objective", ["end_to_end", "layerwise"])
def test_a_training_step_that_breaks_off(tmp_path, objective, monkeypatch):
    """Fading, groups of ranks and dropout are those of before; the mode of the rest is transformers' own business."""
    model = gated("phi3", resid_pdrop=0.5).train()
    one = trainer_of(tmp_path, model, objective=objective)
    inner = find_gated_model(model)
    before = [(layer.fading, layer.row_group, layer.recording) for layer in inner.gated_layers]
    monkeypatch.setattr(trainer, "capacity_loss", broken)
    with pytest.raises(Broken) as error:  # held, as a debugger or a notebook holds it
        one.training_step(model, batch_of(one))
    assert [(layer.fading, layer.row_group, layer.recording) for layer in inner.gated_layers] == before
    assert one._dropouts and all(dropout.training for dropout in one._dropouts)
    assert error.type is Broken and not any(layer.disable_adapters for layer in inner.gated_layers)


def test_dropout_is_on_again_after_a_run(tmp_path):
    model = gated("phi3", resid_pdrop=0.5).train()
    one = trainer_of(tmp_path, model, max_steps=2)
    one.train()
    assert one._dropouts and all(dropout.training for dropout in one._dropouts)


@pytest.mark.parametrize("of", ["text", "answers"])
def test_a_caller_that_fails_between_two_passes(of, monkeypatch):
    """Passes are given one by one; a caller that stops in between ends them, also if somebody keeps the error."""
    model, kept = mixed_modes()
    if of == "text":
        monkeypatch.setattr(text, "_score_text", broken)
    else:
        monkeypatch.setattr(answers, "_score_answer", broken)
    contenders = [Contender("retention", 8, "uniform")]
    example = SimpleNamespace(prompt_ids=[3, 4, 5, 6] * 4, answer_ids=[7, 8])
    with pytest.raises(Broken) as error:
        if of == "text":
            text.compare_rows(model, ROWS, contenders)
        else:
            answers.compare_answers(model, "recall", [example], contenders)
    assert error.type is Broken
    assert_as_before(model, kept)


def test_generate_that_breaks_off(monkeypatch):
    model, kept = mixed_modes()
    cache = BoundedCache(model, memory_size=8)
    forward = type(find_gated_model(model).model).forward
    calls = []

    def breaks_off(self, *args, **kwargs):
        calls.append(self.training)
        return broken() if len(calls) == 3 else forward(self, *args, **kwargs)

    monkeypatch.setattr(type(find_gated_model(model).model), "forward", breaks_off)
    with pytest.raises(Broken) as error:
        model.generate(input_ids=ROWS[:, :12], past_key_values=cache, max_new_tokens=6, do_sample=False)
    assert error.type is Broken and calls == [False] * 3
    assert "forward" not in vars(find_gated_model(model).model)
    assert_as_before(model, kept)


def test_rows_that_are_dealt_to_groups():
    groups = RowGroups(SimpleNamespace(state=SimpleNamespace(device_mesh="all ranks")), size=1)
    groups.mesh = "groups"
    with pytest.raises(Broken), groups.dealt_rows():
        assert groups.accelerator.state.device_mesh == "groups"
        broken()
    assert groups.accelerator.state.device_mesh == "all ranks"
