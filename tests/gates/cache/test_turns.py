"""What `generate` and a forward pass are asked with a bounded cache: turns, masks, modes of the model."""

import pytest
import torch
from gated_models import gated_model, token_ids

from retention_gates import BoundedCache
from retention_gates.gates.adapter.modes import evaluating

GREEDY = dict(do_sample=False, max_new_tokens=8)


def first_turn(model, **options):
    """A cache that has read 16 + 8 - 1 tokens, and the text so far."""
    cache = BoundedCache(model, memory_size=12)
    return cache, model.generate(input_ids=token_ids(1, 16), past_key_values=cache, **GREEDY, **options)


@pytest.mark.parametrize("new", [1, 7, 23, 24, 60])
def test_new_ids_alone_without_their_mask_are_refused_and_nothing_is_read(new):
    model = gated_model()
    cache, text = first_turn(model)
    for options in ({}, {"attention_mask": torch.ones(1, new, dtype=torch.long)}):
        match = r"after the 23 that the cache has read, pass attention_mask \[B, " + str(23 + new)
        with pytest.raises(ValueError, match=match):
            model.generate(input_ids=token_ids(1, new, seed=3), past_key_values=cache, **options, **GREEDY)
    assert cache.get_seq_length() == 23
    mask = torch.ones(1, 23 + new, dtype=torch.long)
    ids = token_ids(1, new, seed=3)
    ids[0, 0] = text[0, -1]  # which was generated and not yet read
    alone = model.generate(input_ids=ids, attention_mask=mask, past_key_values=cache.fork(), **GREEDY)
    whole = torch.cat([text[:, :23], ids], dim=1)
    assert torch.equal(model.generate(input_ids=whole, past_key_values=cache, **GREEDY)[:, 23:], alone)


@pytest.mark.parametrize("columns", [3, 22, 40])
def test_a_mask_of_another_length(columns):
    model = gated_model()
    cache, _ = first_turn(model)
    mask = torch.ones(1, columns, dtype=torch.long)
    with pytest.raises(
        ValueError, match=f"attention_mask has {columns} columns, the cache has read 23 tokens and inp"
    ):
        model.generate(input_ids=token_ids(1, 7), attention_mask=mask, past_key_values=cache, **GREEDY)
    assert cache.get_seq_length() == 23


def test_another_text_is_no_later_turn_and_a_reset_begins_it():
    model = gated_model()
    cache, _text = first_turn(model, return_dict_in_generate=True)
    other = token_ids(1, 60, seed=9)
    with pytest.raises(ValueError, match="first 23 of 60 input_ids are not those that the cache has read"):
        model.generate(input_ids=other, past_key_values=cache, **GREEDY)
    cache.reset()
    fresh = BoundedCache(model, memory_size=12)
    found = [model.generate(input_ids=other, past_key_values=each, **GREEDY) for each in (cache, fresh)]
    assert torch.equal(*found)


def test_a_file_that_turns_the_cache_off_does_not():
    model = gated_model()
    expected = model.generate(input_ids=token_ids(1, 16), past_key_values=BoundedCache(model, 12), **GREEDY)
    model.generation_config.use_cache = False
    cache = BoundedCache(model, 12)
    assert torch.equal(model.generate(input_ids=token_ids(1, 16), past_key_values=cache, **GREEDY), expected)
    assert cache.get_seq_length() == 23
    with pytest.raises(ValueError, match="use_cache=False with a BoundedCache"):
        model.generate(input_ids=token_ids(1, 16), past_key_values=BoundedCache(model, 12), use_cache=False, **GREEDY)


def test_generate_right_after_training():
    model = gated_model()
    expected = model.generate(input_ids=token_ids(1, 16), past_key_values=BoundedCache(model, 12), **GREEDY)
    model.get_base_model().gradient_checkpointing_enable()
    model.train()
    frozen = model.get_base_model().model.layers[0].mlp
    frozen.eval()  # what a caller keeps out of training stays out of it
    cache = BoundedCache(model, 12)
    assert torch.equal(model.generate(input_ids=token_ids(1, 16), past_key_values=cache, **GREEDY), expected)
    assert cache.get_seq_length() == 23
    assert model.training and not frozen.training and not frozen.down_proj.training
    empty = BoundedCache(model, 12)
    with pytest.raises(ValueError, match="training mode with gradient checkpointing.*call model.eval"):
        model(input_ids=token_ids(1, 16), past_key_values=empty)
    assert empty.is_empty
    with pytest.raises(ValueError, match="rolls the cache back"):
        model.generate(token_ids(1, 16), past_key_values=empty, prompt_lookup_num_tokens=2)
    assert model.training


def test_modes_are_put_back_after_an_error():
    model = gated_model().train()
    with pytest.raises(RuntimeError), evaluating(model):
        assert not any(module.training for module in model.modules())
        raise RuntimeError
    assert all(module.training for module in model.modules())


@pytest.mark.parametrize("policy", ["retention", "h2o"])
@pytest.mark.parametrize("family", ["llama", "gemma2", "qwen3"])
def test_under_autocast_a_bounded_cache_gives_what_the_full_cache_gives(family, policy):
    model = gated_model(family)
    ids = token_ids(2, 20)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        with model.disable_adapter():
            expected = model(input_ids=ids).logits
        cache = BoundedCache(model, memory_size=64, policy=policy)
        found = [model(input_ids=part, past_key_values=cache).logits for part in ids.split([12, 1, 1, 6], dim=1)]
        tokens = model.generate(input_ids=ids, past_key_values=BoundedCache(model, 8, policy=policy), **GREEDY)
    torch.testing.assert_close(torch.cat(found, dim=1), expected, rtol=0.05, atol=0.05)
    assert cache.gated_layers[0].keys.dtype == torch.bfloat16 and tokens.shape == (2, 28)
