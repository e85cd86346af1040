"""Long streams: far from 0 a cache does what it does near it, up to the last token that it can count."""

import copy

import pytest
import torch
from gated_models import gated_model, step_by_step, token_ids
from layer_calls import attend
from torch import nn

from retention_gates.gates.cache import BoundedCache
from retention_gates.gates.cache.slot_layer import SlotLayer
from retention_gates.gates.policies import POLICIES
from retention_gates.gates.policies.eviction_rule import MOST_TOKENS, EvictionRule

OWNER = nn.Identity()


def after(shift: int, policy: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Outputs of 60 tokens that come after `shift` columns of padding, and what is held, counted from there."""
    generator = torch.Generator().manual_seed(0)
    log_beta = -torch.rand(1, 2, 60, generator=generator).pow(4) / 50
    query, key, value = torch.randn(3, 1, 2, 60, 4, generator=generator)
    layer = SlotLayer(EvictionRule(POLICIES[policy], (9, 13), 2, ((0, 2), (5, 6)), 0, layer=0), OWNER)
    layer.lazy_initialization(key, value)
    layer.columns = shift
    layer.seen.fill_(shift)
    layer.start.fill_(shift)
    outputs = [
        attend(layer, OWNER, *(x[:, :, now] for x in (log_beta, query, key, value)))
        for now in torch.arange(60).split([20] + [1] * 25 + [15])
    ]
    held = torch.cat([layer.positions(head) for head in (0, 1)], dim=1)
    return torch.cat(outputs, dim=2), held - shift * (held >= 0)


@pytest.mark.parametrize("policy", ["retention", "streaming_llm", "random"])
@pytest.mark.parametrize("shift", [2**17 + 1, 2**23 + 3, MOST_TOKENS - 60])
def test_far_out_is_like_near_zero(shift, policy):
    near, held = after(0, policy)
    far, still_held = after(shift, policy)
    assert torch.equal(near, far) and torch.equal(held, still_held)


def test_the_token_that_cannot_be_counted_is_refused_before_anything_changes():
    model = gated_model()
    cache = BoundedCache(model, memory_size=8)
    step_by_step(model, token_ids(1, 20), cache)
    for layer in cache.gated_layers:
        layer.columns = MOST_TOKENS - 1
        layer.seen.fill_(MOST_TOKENS - 1)
    before = copy.deepcopy(cache)
    with pytest.raises(ValueError, match="has read 16777215 tokens, and 2 more would pass 16777216"):
        model(input_ids=token_ids(1, 2), past_key_values=cache)
    assert torch.equal(step_by_step(model, token_ids(1, 1), cache), step_by_step(model, token_ids(1, 1), before))
    with pytest.raises(ValueError, match="call cache.reset"):
        model(input_ids=token_ids(1, 1), past_key_values=cache)
    cache.reset()
    step_by_step(model, token_ids(1, 3), cache)


@pytest.mark.parametrize("rope", [{}, {"rope_type": "dynamic", "factor": 2.0}, {"rope_type": "linear", "factor": 2.0}])
def test_beyond_the_positions_that_the_config_names(rope):
    """With room for all, the tokens are those of the full cache, wherever RoPE is stretched or not."""
    parameters = {"rope_theta": 10_000.0, "rope_type": "default"} | rope
    model = gated_model(num_hidden_layers=2, max_position_embeddings=64, rope_parameters=parameters)
    ids, cache = token_ids(1, 50), BoundedCache(model, memory_size=100)
    found = model.generate(input_ids=ids, past_key_values=cache, do_sample=False, max_new_tokens=40)
    with model.disable_adapter():
        expected = model.generate(input_ids=ids, do_sample=False, max_new_tokens=40)
    assert torch.equal(found, expected)


def test_a_generate_that_drops_the_cache_is_refused():
    model = gated_model("phi3", original_max_position_embeddings=64)
    cache = BoundedCache(model, memory_size=8)
    model.generate(input_ids=token_ids(1, 40), past_key_values=cache, max_new_tokens=24)
    cache.reset()
    for prompt, new in ((40, 25), (70, 5)):
        with pytest.raises(ValueError, match=f"{prompt + new} tokens, prompt and new ones, pass 64"):
            model.generate(input_ids=token_ids(1, prompt), past_key_values=cache, max_new_tokens=new)
    assert cache.is_empty
