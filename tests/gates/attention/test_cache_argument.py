"""A cache is found under every name that a version of transformers has for it, and nowhere else without an error."""

import inspect
import warnings
from functools import partialmethod

import pytest
import torch
from gated_models import gated_model, token_ids
from transformers import DynamicCache

from retention_gates import BoundedCache
from retention_gates.gates.attention.cache_argument import NAMES, find_cache, find_layer_cache, named_for

GREEDY = dict(do_sample=False, max_new_tokens=9)


def attention_call(model):
    """A gated attention module and what its decoder layer calls it with."""
    calls = []
    layer = model.base_model.gated_layers[0]
    handle = layer.register_forward_pre_hook(
        lambda _, args, kwargs: calls.append((args, dict(kwargs))), with_kwargs=True
    )
    with torch.no_grad():
        model(input_ids=token_ids(1, 6), use_cache=False)
    handle.remove()
    args, kwargs = calls[0]
    return layer, args, {name: value for name, value in kwargs.items() if name not in NAMES}


@pytest.mark.parametrize("kind", ["bounded", "dynamic"])
@pytest.mark.parametrize("where", ["memory", "dict", "tuple", "positional", "layer"])
def test_a_cache_where_none_is_looked_for(kind, where):
    model = gated_model()
    layer, args, kwargs = attention_call(model)
    cache = BoundedCache(model, memory_size=8) if kind == "bounded" else DynamicCache(config=model.config)
    if where == "positional":
        args = (*args, None, None, cache) if args else (kwargs.pop("hidden_states"), None, None, cache)
    else:
        hidden = {"memory": cache, "dict": {"kv": cache}, "tuple": (1, cache), "layer": cache.layers[0]}[where]
        kwargs["memory"] = hidden
    with torch.no_grad(), pytest.raises(ValueError, match="where no cache is expected .known names: cache, past_key"):
        layer(*args, **kwargs)
    assert cache.get_seq_length() == 0


def test_a_cache_of_another_kind():
    layer, args, kwargs = attention_call(gated_model())
    with torch.no_grad(), pytest.raises(ValueError, match="got a tuple as its cache"):
        layer(*args, past_key_values=(torch.zeros(1, 2, 3, 4), torch.zeros(1, 2, 3, 4)), **kwargs)


def test_more_keys_than_tokens_without_a_cache(monkeypatch):
    """As where a cache is kept in a place that nobody can look into."""
    model = gated_model()
    layer, args, kwargs = attention_call(model)
    forward, hidden = type(layer.base_layer).forward, DynamicCache(config=model.config)
    (name,) = set(NAMES) & set(inspect.signature(forward).parameters)
    monkeypatch.setattr(type(layer.base_layer), "forward", partialmethod(forward, **{name: hidden}))
    with torch.no_grad():
        layer(*args, **kwargs)  # as many keys as tokens: nothing can be seen
        with pytest.raises(ValueError, match="got 6 tokens and no cache, but attends to 12 keys"):
            layer(*args, **kwargs)


@pytest.mark.parametrize("family", ["llama", "gemma3_text", "gpt_oss"])
def test_every_name_gives_the_same_tokens_without_a_warning(family):
    model = gated_model(family)
    ids, tokens, logits = token_ids(2, 12), [], []
    for name in ("cache", "past_key_values"):
        with warnings.catch_warnings():
            warnings.filterwarnings("error", message=".*deprecated.*Use `cache` instead")
            cache = BoundedCache(model, memory_size=8)
            tokens.append(model.generate(input_ids=ids, **{name: cache}, **GREEDY))
            with torch.no_grad():
                logits.append(model(input_ids=ids, **{name: BoundedCache(model, memory_size=8)}).logits)
        assert cache.get_seq_length() == 20
    assert torch.equal(*tokens) and torch.equal(*logits)


def test_a_cache_given_twice():
    model = gated_model()
    one, other = (BoundedCache(model, memory_size=8) for _ in range(2))
    with pytest.raises(ValueError, match="given twice, as cache and as past_key_values"):
        model.generate(input_ids=token_ids(1, 5), cache=one, past_key_values=other, **GREEDY)


def test_names():
    def old(input_ids, past_key_values=None): ...
    def new(input_ids, cache=None): ...

    assert named_for(old, {"cache": 1, "input_ids": 2}) == {"past_key_values": 1, "input_ids": 2}
    assert named_for(new, {"past_key_values": 1}) == {"cache": 1}
    assert named_for(new, {"input_ids": 2}) == {"input_ids": 2}
    assert find_cache({"cache": None, "layer_past": 3}) == 3 and find_cache({}) is None
    assert find_layer_cache((1, "x"), {"position_embeddings": (1, 2), "past_key_values": None}) is None
