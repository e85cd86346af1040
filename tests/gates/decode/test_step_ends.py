"""What a step changes while it is open or runs is as before when it ends, by an error or inside of another."""

import pytest
import torch
from gated_models import gated_model, token_ids
from torch import nn

from retention_gates import BoundedCache, find_gated_model
from retention_gates.gates.cache.window_layer import WindowLayer
from retention_gates.gates.decode.fused_layers import in_this_thread, replaced_forwards
from retention_gates.gates.decode.windows import Windows


class Broken(RuntimeError):
    pass


@pytest.mark.parametrize("fails", [False, True])
def test_a_step_that_is_open_stays_open_when_generate_is_done(device, captures, fails):
    """Rows of the endpoint keep their step open; what somebody generates with the same cache must not close it."""
    model = gated_model().to(device)
    base, cache = find_gated_model(model).model, BoundedCache(model, memory_size=8)
    ids = token_ids(2, 12).to(device)
    with torch.no_grad(), cache.decode_step.opened(base, cache) as step:
        recorder = step.recorder
        if fails:
            with pytest.raises(Broken), step.in_generate(base, cache, prompt_columns=40):
                raise Broken
        else:
            model.generate(input_ids=ids, past_key_values=cache, do_sample=False, max_new_tokens=2)
        assert step.is_open and step.recorder is recorder and step.prompt_columns == 0
        assert "forward" not in vars(base)
        cache.reset()
        base(input_ids=ids, past_key_values=cache)
        for position in range(12, 18):
            step(input_ids=ids[:, :1], position_ids=torch.full_like(ids[:, :1], position))
    assert captures and not step.is_open and step.recorder is None


@pytest.mark.parametrize("fails", [False, True])
def test_a_layer_with_a_forward_of_its_own_keeps_it(fails):
    """Accelerate gives layers one, perhaps after a step has found out what it computes otherwise."""
    plain, hooked = nn.Linear(2, 2), nn.Linear(2, 2)
    hooked.forward = own = lambda x: x + 1
    forwards = [(layer, in_this_thread(layer, lambda x: x * 2)) for layer in (plain, hooked)]
    try:
        with replaced_forwards(forwards, {}):
            assert plain(torch.ones(1, 2)).tolist() == hooked(torch.ones(1, 2)).tolist() == [[2.0, 2.0]]
            if fails:
                raise Broken
    except Broken:
        pass
    assert vars(hooked)["forward"] is own and "forward" not in vars(plain)


def test_windows_see_as_before_after_a_step_that_breaks_off():
    layers = [WindowLayer(sliding_window=4) for _ in range(2)]
    for layer in layers:
        layer.update(*torch.randn(2, 1, 2, 6, 4))
    windows = Windows(layers, None)
    with pytest.raises(Broken), windows.one_token():
        assert all(layer.visible is windows.visible for layer in layers)
        raise Broken
    assert all(layer.visible is None for layer in layers)
    assert [layer.cumulative_length for layer in layers] == [6, 6]  # a token that was not read does not count
