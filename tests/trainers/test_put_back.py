"""What is changed for a while is put back, also where an error ends it."""

import pytest
import torch
from tiny_training import Rows, gated, trainer_of

from retention_gates import find_gated_model
from retention_gates.trainers import calibration, checks, pictures, trainer
from retention_gates.trainers.calibration import measure_shares
from retention_gates.trainers.evaluation import text
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
        monkeypatch.setattr(trainer, "compare_rows", broken)
        with pytest.raises(Broken):
            one.evaluate()
    else:
        assert "eval_kl_8" in one.evaluate()
    assert config.budget_shares is SHARES
