"""What a bounded cache refuses, and what it says then."""

import math

import numpy as np
import pytest
import torch
from gated_models import gated_model, step_by_step, token_ids

from retention_gates import RetentionGateConfig, find_gated_model
from retention_gates.gates.cache import BoundedCache
from retention_gates.gates.simulation.simulated_cache import SimulatedCache


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(memory_size=0), "memory_size=0"),
        (dict(memory_size=-3), "memory_size=-3"),
        (dict(memory_size=8.0), "memory_size=8.0"),
        (dict(memory_size=True), "memory_size=True"),
        (dict(memory_size="64"), "memory_size='64'"),
        (dict(memory_size=np.int64(8)), r"memory_size=np.int64\(8\) must be .* as a Python int"),
        (dict(memory_size=math.nan), "memory_size=nan"),
        (dict(memory_size=8, budgets=[8, 8]), r"budgets=\[8, 8\] is unknown"),
        (dict(memory_size=2), "memory_size=2 must be at least 3"),
        (dict(memory_size=8, protected_tokens=8), "memory_size=8 must be at least 9"),
        (dict(memory_size=8, protected_tokens=-1), "protected_tokens=-1"),
        (dict(memory_size=8, policy="retntion"), "Did you mean 'retention'"),
        (dict(memory_size=8, policy=None), "policy=None"),
        (dict(memory_size=8, policy=["h2o"]), "policy=.*is unknown"),
        (
            dict(memory_size=8, policy="tova", budgets=[[8, 8], [8, 8], [6, 10], [8, 8]]),
            r"layer 2 have budgets of \[6, 10\]",
        ),
        (dict(memory_size=8, policy="tova", budgets="adaptive"), "layer 0 have budgets that they share"),
        (dict(memory_size=8, budgets="globl"), "budgets='globl' is unknown"),
        (dict(memory_size=8, budgets=7), "budgets=7"),
        (dict(memory_size=8, budgets="calibrated"), "no budget shares|does not have"),
        (dict(memory_size=8, budgets=[[8, 8]]), r"\[4 gated layers\]\[2 KV heads\]"),
        (dict(memory_size=8, budgets=[[2, 14]] * 4), "at least 3"),
        (dict(memory_size=8, budgets=[[8.0, 8.0]] * 4), "integers"),
        (
            dict(memory_size=9, budgets=[[8, 8]] * 4),
            "64 entries in all, which must be memory_size=9 for each of the 8 heads: 72",
        ),
        (dict(memory_size=8, buffer_size=0), "buffer_size=0"),
        (dict(memory_size=8, reserved=[(3, 9, 6)]), "memory_size=8 must be at least 9"),
        (dict(memory_size=8, reserved=[(3, 9)]), r"must be \(start, stop, entries\)"),
        (dict(memory_size=8, reserved=[(3, 3, 1)]), "reserved stop=3"),
        (dict(memory_size=8, reserved=[(3, 5, 0)]), "reserved entries=0"),
        (dict(memory_size=8, seed=-1), "seed=-1"),
        (dict(memory_size=8, seed=2**32), "seed=4294967296"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        BoundedCache(gated_model(), **arguments)


@pytest.mark.parametrize("family", ["gemma3_text", "glm4", "cohere2"])
def test_policies_that_rotate_queries_need_a_rotary_embedding_they_know(family):
    # of another kind in some layers, of part of the channels, of channels side by side
    with pytest.raises(ValueError, match="rotary embeddings .* choose another policy"):
        BoundedCache(gated_model(family), memory_size=8, policy="expected_attention")


@pytest.mark.parametrize("cache_class", [BoundedCache, SimulatedCache])
def test_an_instruction_must_be_pinned(cache_class):
    model = gated_model()
    cache = cache_class(model, memory_size=8, policy="citrus")
    with pytest.raises(ValueError, match=r"there is none: call cache.pin\(start, stop\)"):
        model(input_ids=token_ids(1, 20), past_key_values=cache)
    cache.pin(3, 5)
    with torch.no_grad():
        model(input_ids=token_ids(1, 20), past_key_values=cache)


def test_model_without_gates():
    from tiny_models import tiny_model

    with pytest.raises(ValueError, match="no retention gates"):
        BoundedCache(tiny_model(), memory_size=8)


def test_bad_pins():
    cache = BoundedCache(gated_model(), memory_size=8)
    for start, stop in ((-1, 3), (3, 3), (5, 2), (0, True), (0.0, 2)):
        with pytest.raises(ValueError, match="must be an integer"):
            cache.pin(start, stop)
    with pytest.raises(ValueError, match="head=2"):
        cache.layers[0].positions(2)


def test_cache_of_another_model():
    cache, other = BoundedCache(gated_model(), memory_size=8), gated_model()
    with pytest.raises(ValueError, match="another model"):
        other(input_ids=token_ids(1, 3), past_key_values=cache)


def test_gates_off():
    model = gated_model()
    cache = BoundedCache(model, memory_size=8)
    with pytest.raises(ValueError, match="gates are off"), model.disable_adapter():
        model(input_ids=token_ids(1, 3), past_key_values=cache)


@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
def test_other_batch_size(family):
    model = gated_model(family)
    cache = BoundedCache(model, memory_size=8)
    step_by_step(model, token_ids(2, 3), cache)
    for batch in (1, 4):
        with pytest.raises(ValueError, match=f"batch of 2 and got one of {batch}"):
            model(input_ids=token_ids(batch, 1), past_key_values=cache)
    step_by_step(model, token_ids(2, 3), cache)


def test_a_forward_pass_that_broke_off():
    model = gated_model()
    cache = BoundedCache(model, memory_size=8)
    layer = cache.layers[2]
    layer.attend = None  # as if memory ran out there
    with pytest.raises(TypeError):
        model(input_ids=token_ids(1, 3), past_key_values=cache)
    del layer.attend
    with pytest.raises(ValueError, match="broke off"):
        model(input_ids=token_ids(1, 3), past_key_values=cache)
    cache.reset()
    step_by_step(model, token_ids(1, 3), cache)


@torch.no_grad()
def test_a_forward_pass_that_broke_off_between_layers(monkeypatch):
    model = gated_model()
    cache = BoundedCache(model, memory_size=8)
    step_by_step(model, token_ids(1, 3), cache)

    def interrupt(*args, **kwargs):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(find_gated_model(model).model.model.layers[1].mlp, "forward", interrupt)
        model(input_ids=token_ids(1, 1), past_key_values=cache)
    with pytest.raises(ValueError, match="broke off between two layers"):
        model(input_ids=token_ids(1, 1), past_key_values=cache)
    cache.reset()
    step_by_step(model, token_ids(1, 3), cache)


@torch.no_grad()
def test_another_adapter():
    model = gated_model()
    model.add_adapter("b", RetentionGateConfig(gate_width=8))
    model.add_adapter("first", RetentionGateConfig(gate_width=8, layers_to_transform=[0]))
    cache = BoundedCache(model, memory_size=8)
    step_by_step(model, token_ids(1, 3), cache)
    model.set_adapter("b")
    with pytest.raises(ValueError, match="adapter 'default' and another is active"):
        model(input_ids=token_ids(1, 1), past_key_values=cache)
    model.set_adapter("first")
    cache = BoundedCache(model, memory_size=8)
    model.set_adapter("b")
    with pytest.raises(ValueError, match="adapter 'first' and another is active"):
        model(input_ids=token_ids(1, 1), past_key_values=cache)


def test_no_way_back():
    model = gated_model("gemma3_text")
    cache = BoundedCache(model, memory_size=8)
    step_by_step(model, token_ids(1, 3), cache)
    cache.crop(0)
    for tokens in (-1, 2):
        with pytest.raises(ValueError, match="cannot go back"):
            cache.crop(tokens)
    with pytest.raises(ValueError, match="Assisted"):
        cache.activate_past_recording()
    assert not any(getattr(layer, "record_past", False) for layer in cache.layers)
    assert not cache.is_croppable
