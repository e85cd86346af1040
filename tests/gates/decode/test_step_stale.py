"""What a capture depends on: another cache, other slots or weights make it useless, and it goes with its cache."""

import copy
import gc
import weakref

import pytest
import torch
from captured import GREEDY, assert_same, caches, is_captured, on, padded_batch
from gated_models import token_ids
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from retention_gates import RetentionGateConfig, find_gated_model
from retention_gates.gates.cache import BoundedCache


def test_a_copy_captures_for_itself(device, captures):
    model, arguments = on(device), padded_batch(device)
    captured, plain = caches(model)
    text = assert_same(model, captured, plain, **arguments, **GREEDY)
    mask = torch.ones(2, text.shape[1] + 3, dtype=torch.long, device=device)
    mask[:, :12] = arguments["attention_mask"]
    ids = torch.cat([text, token_ids(2, 3, seed=5).to(device)], dim=1)
    expected = None
    for cache in (copy.deepcopy(captured), copy.deepcopy(captured), captured):
        assert is_captured(cache) == (cache is captured)
        tokens = model.generate(
            input_ids=ids, attention_mask=mask, past_key_values=cache, do_sample=False, max_new_tokens=8
        )
        assert expected is None or torch.equal(tokens, expected)
        expected = tokens
    assert len(captures) == 3


def test_a_capture_goes_with_its_cache(device):
    model = on(device)
    cache = BoundedCache(model, memory_size=8)
    model.generate(past_key_values=cache, **padded_batch(device), **GREEDY)
    slots = weakref.ref(cache.gated_layers[0].keys)
    gc.collect()
    gc.disable()
    try:
        del cache
        assert slots() is None
    finally:
        gc.enable()


@pytest.mark.parametrize("change", ["repeat", "select", "pin"])
def test_other_slots_or_another_rule(device, change, captures):
    model, arguments = on(device), padded_batch(device)
    captured, plain = caches(model)
    text = assert_same(model, captured, plain, **arguments, **GREEDY)
    for cache in (captured, plain):
        if change == "repeat":
            cache.batch_repeat_interleave(2)
        elif change == "select":
            cache.batch_select_indices(torch.tensor([1]))
        else:
            cache.pin(0, 1)
    assert not is_captured(captured)
    text = {"repeat": text.repeat_interleave(2, dim=0), "select": text[1:], "pin": text}[change]
    ids = torch.cat([text, token_ids(len(text), 3, seed=5).to(device)], dim=1)
    assert_same(model, captured, plain, input_ids=ids, attention_mask=torch.ones_like(ids), **GREEDY)
    assert len(captures) == 2


def replace_weights(model):
    layer = model.get_decoder().layers[0].mlp
    layer.up_proj.weight = nn.Parameter(layer.up_proj.weight.flip(0), requires_grad=False)


def swap_data(model):
    weight = model.get_decoder().layers[0].mlp.up_proj.weight
    weight.data = weight.data.flip(0)


def change_in_place(model):
    model.get_decoder().layers[0].mlp.up_proj.weight.data.neg_()


def move_there_and_back(model):
    device, dtype = model.device, model.dtype
    model.to("cpu").double()
    model.to(device, dtype)


@pytest.mark.parametrize("change", [replace_weights, swap_data, change_in_place, move_there_and_back])
def test_other_weights(device, change):
    model = on(device)
    captured, plain = caches(model)
    before = assert_same(model, captured, plain, **padded_batch(device), **GREEDY)
    change(find_gated_model(model).model)
    captured.reset()
    plain.reset()
    after = assert_same(model, captured, plain, **padded_batch(device), **GREEDY)
    assert torch.equal(before, after) == (change is move_there_and_back)


def test_an_adapter_of_the_base_switched_off(device):
    """Its weights stay where they are; only what Python does with them changes."""
    model = on(device)

    class Scaled(nn.Module, BaseTunerLayer):
        adapter_layer_names = ("scale",)

        def __init__(self, base_layer):
            super().__init__()
            self.base_layer, self.scale = base_layer, nn.ParameterDict({"a": torch.tensor(1.5)})
            self._active_adapter, self._disable_adapters, self.merged_adapters = ["a"], False, []

        def forward(self, x):
            return self.base_layer(x) if self.disable_adapters else self.base_layer(x) * self.scale["a"]

    mlp = find_gated_model(model).model.get_decoder().layers[0].mlp
    mlp.up_proj = Scaled(mlp.up_proj).to(device)
    captured, plain = caches(model)
    before = assert_same(model, captured, plain, **padded_batch(device), **GREEDY)
    mlp.up_proj._disable_adapters = True
    captured.reset()
    plain.reset()
    assert not torch.equal(assert_same(model, captured, plain, **padded_batch(device), **GREEDY), before)


def test_another_adapter_or_model(device):
    model, other = on(device), on(device)
    cache = BoundedCache(model, memory_size=8)
    model.generate(past_key_values=cache, **padded_batch(device), **GREEDY)
    cache.reset()
    with pytest.raises(ValueError, match="another model"):
        other.generate(past_key_values=cache, **padded_batch(device), **GREEDY)
    with pytest.raises(ValueError, match="gates are off"), model.disable_adapter():
        model.generate(past_key_values=cache, **padded_batch(device), **GREEDY)
    cache.reset()
    model.add_adapter("second", RetentionGateConfig(gate_width=16))
    model.set_adapter("second")
    with pytest.raises(ValueError, match="adapter 'default' and another is active"):
        model.generate(past_key_values=cache, **padded_batch(device), **GREEDY)
