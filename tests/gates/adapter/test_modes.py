"""States that hold for a while end with it, whatever happens inside and however they are nested."""

from contextlib import ExitStack
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny_training import gated
from torch import nn

from retention_gates import find_gated_model
from retention_gates.gates.adapter.gate_outputs import record
from retention_gates.gates.adapter.modes import evaluating, temporarily
from retention_gates.gates.attention.fading import Fading
from retention_gates.trainers.evaluation.forward_passes import gates_off

MODEL = gated()
GATED = find_gated_model(MODEL)


class Broken(RuntimeError):
    pass


def attention_of(model):
    return model.model.config._attn_implementation


def state():
    """All that the blocks below change."""
    layers = GATED.gated_layers
    return (
        [module.training for module in GATED.modules()],
        [(layer.recording, layer.fading, layer.row_group, layer.disable_adapters) for layer in layers],
        [parameter.requires_grad for parameter in GATED.parameters()],
        (GATED._row_group, attention_of(GATED), GATED.active_config.budget_shares),
    )


def shares_of_one():
    return temporarily([GATED.active_config], budget_shares=[[1.0, 1.0]])


BLOCKS = {
    "evaluating": lambda: evaluating(GATED),
    "recording": lambda: record(GATED),
    "fading": lambda: GATED.fading_as(Fading(gaussian=True)),
    "rows of a group": lambda: GATED.rows_split_over(SimpleNamespace(size=2, rank=0)),
    "rows of nobody": lambda: GATED.rows_split_over(None),
    "gates off": lambda: gates_off(GATED),
    "PEFT's gates off": lambda: MODEL.disable_adapter(),
    "shares": shares_of_one,
}


@given(st.lists(st.sampled_from(sorted(BLOCKS)), max_size=6), st.data())
def test_any_blocks_in_one_another(names, data):
    """On the way out, too, each leaves what the one around it had made."""
    seen = []
    with pytest.raises(Broken), ExitStack() as stack:
        for name in names:
            before = state()
            stack.callback(lambda before=before: seen.append(state() == before))
            stack.enter_context(BLOCKS[name]())
            if name == "evaluating" and data.draw(st.booleans(), label="the block changes a mode itself"):
                GATED.model.get_decoder().layers[0].train()
        raise Broken
    assert all(seen) and len(seen) == len(names)


def test_a_recording_inside_another_ends_alone():
    ids = torch.arange(3, 15)[None]
    with record(GATED) as outer:
        with pytest.raises(Broken), record(GATED) as inner:
            MODEL(input_ids=ids, use_cache=False)
            raise Broken
        MODEL(input_ids=ids, use_cache=False)
    assert len(outer.log_beta) == len(inner.log_beta) == len(GATED.gated_layers)
    assert all(layer.recording is None for layer in GATED.gated_layers)


def test_gates_that_were_off_stay_off():
    with MODEL.disable_adapter():
        with gates_off(GATED):
            pass
        assert all(layer.disable_adapters for layer in GATED.gated_layers)
        assert attention_of(GATED) == "sdpa"
    assert not any(layer.disable_adapters for layer in GATED.gated_layers)


def test_modes_that_the_block_changes_itself():
    model = nn.Sequential(nn.Dropout(), nn.Sequential(nn.Dropout(), nn.Linear(2, 2))).train()
    model[1].eval()
    before = [module.training for module in model.modules()]
    with pytest.raises(Broken), evaluating(model):
        assert not any(module.training for module in model.modules())
        model.train()
        raise Broken
    assert [module.training for module in model.modules()] == before


def test_modes_where_eval_itself_fails():
    class Stubborn(nn.Dropout):
        def train(self, mode=True):
            raise Broken

    model = nn.Sequential(nn.Dropout(), Stubborn())
    with pytest.raises(Broken), evaluating(model):
        pass
    assert all(module.training for module in model.modules())


def test_a_value_that_is_refused_leaves_none_of_the_others():
    class Picky:
        size = property(lambda self: 1)

    plain = SimpleNamespace(size=1)
    with pytest.raises(AttributeError), temporarily([plain, Picky()], size=2):
        pass
    assert plain.size == 1
