"""BoundedCache behind model.generate."""

import copy
from importlib.metadata import version

import pytest
import torch
from gated_models import gated_model, token_ids
from packaging.version import Version
from transformers import DynamicCache, GenerationConfig

from retention_gates.gates.adapter import generate_arguments
from retention_gates.gates.adapter.layer import logger
from retention_gates.gates.cache import BoundedCache
from retention_gates.gates.policies import POLICIES

GREEDY = dict(do_sample=False, max_new_tokens=25)


def base_tokens(model, **arguments):
    with model.disable_adapter():
        return model.generate(**arguments)


def padded(ids, columns):
    """ids [1, T] behind `columns` columns of padding, and the mask."""
    mask = torch.ones(1, ids.shape[1] + columns, dtype=torch.int64)
    mask[:, :columns] = 0
    return torch.cat([torch.zeros(1, columns, dtype=torch.int64), ids], dim=1), mask


@pytest.mark.parametrize("family", ["llama", "gemma2", "gemma3_text", "gpt_oss", "qwen3_next"])
@pytest.mark.parametrize("policy", ["retention", "key_norm"])
def test_enough_memory_gives_the_full_caches_tokens(family, policy):
    model = gated_model(family)
    ids = token_ids(2, 12)
    cache = BoundedCache(model, memory_size=12 + 24, policy=policy)  # the last token made is never read
    assert torch.equal(
        model.generate(input_ids=ids, past_key_values=cache, **GREEDY), base_tokens(model, input_ids=ids, **GREEDY)
    )
    assert cache.get_seq_length() == 36


@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
def test_enough_memory_in_a_padded_batch(family):
    model = gated_model(family)
    rows = [padded(token_ids(1, length, seed=length), 12 - length) for length in (12, 5)]
    ids, mask = (torch.cat(parts) for parts in zip(*rows, strict=True))
    cache = BoundedCache(model, memory_size=40)
    assert torch.equal(
        model.generate(input_ids=ids, attention_mask=mask, past_key_values=cache, **GREEDY),
        base_tokens(model, input_ids=ids, attention_mask=mask, **GREEDY),
    )


# what is generated repeats itself: ties in the norms of the first layer
@pytest.mark.parametrize(
    ("family", "policy"),
    [("llama", policy) for policy in sorted(POLICIES.keys() - {"key_norm", "value_norm"})]
    + [("gemma3_text", policy) for policy in ("retention", "h2o")],
)
def test_padded_batch_gives_the_tokens_of_its_rows_alone(family, policy):
    model = gated_model(family, **(dict(num_hidden_layers=2) if family == "llama" else {}))
    greedy = GREEDY | {"max_new_tokens": 16}
    lengths = (30, 4, 19)  # longer and shorter than the budget
    prompts = [token_ids(1, length, seed=length) for length in lengths]
    ids, mask = (torch.cat(parts) for parts in zip(*(padded(p, 30 - p.shape[1]) for p in prompts), strict=True))
    cache = BoundedCache(model, memory_size=10, policy=policy)
    cache.pin(2, 4)
    together = model.generate(input_ids=ids, attention_mask=mask, past_key_values=cache, **greedy)
    for row, prompt in enumerate(prompts):
        alone = BoundedCache(model, memory_size=10, policy=policy)
        alone.pin(2, 4)
        tokens = model.generate(input_ids=prompt, past_key_values=alone, **greedy)
        assert torch.equal(together[row, 30:], tokens[0, prompt.shape[1] :])


@pytest.mark.parametrize("length", [1, 3, 10, 11, 300])
def test_prompts_shorter_and_far_longer_than_the_budget(length):
    model = gated_model()
    ids = token_ids(2, length)
    cache = BoundedCache(model, memory_size=10)
    tokens = model.generate(input_ids=ids, past_key_values=cache, **GREEDY)
    # the same by hand: the prompt in one pass, then the most likely token at each step
    by_hand, last = BoundedCache(model, memory_size=10), ids
    with torch.no_grad():
        for step in range(25):
            last = model(input_ids=last, past_key_values=by_hand).logits[:, -1:].argmax(-1)
            assert torch.equal(last[:, 0], tokens[:, length + step])
    assert cache.get_seq_length() == length + 24
    assert (cache.layers[0].positions(0) >= 0).sum(1).tolist() == [10, 10]


@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
def test_chunked_prefill(family):
    model = gated_model(family)
    ids, mask = padded(token_ids(1, 20), 3)
    arguments = dict(input_ids=ids, attention_mask=mask, **GREEDY)
    whole = model.generate(past_key_values=BoundedCache(model, memory_size=60), **arguments)
    for size in (1, 7, 16):
        cache = BoundedCache(model, memory_size=60)  # no eviction falls between the chunks
        assert torch.equal(model.generate(past_key_values=cache, prefill_chunk_size=size, **arguments), whole)
        small = BoundedCache(model, memory_size=8)
        tokens = model.generate(past_key_values=small, prefill_chunk_size=size, **arguments)
        assert tokens.shape == whole.shape and small.get_seq_length() == 47
        by_hand = BoundedCache(model, memory_size=8)
        position_ids = (mask.cumsum(1) - 1).clamp(min=0)
        with torch.no_grad():
            for start in range(0, 23, size):
                stop = min(start + size, 23)
                now = slice(start, stop)
                logits = model(
                    input_ids=ids[:, now],
                    attention_mask=mask[:, :stop],
                    position_ids=position_ids[:, now],
                    past_key_values=by_hand,
                ).logits
        assert torch.equal(logits[:, -1].argmax(-1), tokens[:, 23])


def test_beams():
    model = gated_model()
    ids = token_ids(2, 12)
    beams = GREEDY | dict(num_beams=4, num_return_sequences=3)
    cache = BoundedCache(model, memory_size=40)
    expected = base_tokens(model, input_ids=ids, **beams)
    assert torch.equal(model.generate(input_ids=ids, past_key_values=cache, **beams), expected)
    small = BoundedCache(model, memory_size=6)
    found = model.generate(input_ids=ids, past_key_values=small, **beams)
    assert found.shape == expected.shape and small.layers[0].batch_size == 8


@pytest.mark.parametrize("policy", ["retention", "h2o", "snapkv"])
def test_beams_follow_their_rows(policy):
    """The score of a beam, read again from its tokens alone, is the one that the search gave it."""
    model = gated_model()
    ids = token_ids(1, 12)
    cache = BoundedCache(model, memory_size=6, policy=policy)
    found = model.generate(
        input_ids=ids,
        past_key_values=cache,
        num_beams=3,
        num_return_sequences=3,
        length_penalty=0.0,
        output_scores=True,
        return_dict_in_generate=True,
        **GREEDY,
    )
    for tokens, score in zip(found.sequences, found.sequences_scores, strict=True):
        alone, total = BoundedCache(model, memory_size=6, policy=policy), 0.0
        with torch.no_grad():
            logits = model(input_ids=ids, past_key_values=alone).logits[:, -1]
            for token in tokens[12:]:
                total += logits.log_softmax(-1)[0, token].item()
                logits = model(input_ids=token.view(1, 1), past_key_values=alone).logits[:, -1]
        assert total == pytest.approx(score.item(), abs=1e-3)


def test_sampling_and_several_sequences():
    model = gated_model()
    ids = token_ids(2, 12)
    sampling = dict(do_sample=True, num_return_sequences=3, max_new_tokens=20, temperature=1.5)
    torch.manual_seed(0)
    expected = base_tokens(model, input_ids=ids, **sampling)
    torch.manual_seed(0)
    cache = BoundedCache(model, memory_size=40)
    assert torch.equal(model.generate(input_ids=ids, past_key_values=cache, **sampling), expected)
    small = BoundedCache(model, memory_size=5)
    assert model.generate(input_ids=ids, past_key_values=small, **sampling).shape == (6, 32)


@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
@pytest.mark.parametrize("memory_size", [8, 200])
def test_conversation_with_one_cache(family, memory_size):
    model = gated_model(family)
    cache = BoundedCache(model, memory_size=memory_size)
    by_hand = BoundedCache(model, memory_size=memory_size)
    text = token_ids(1, 9)
    for turn in range(3):
        if turn:
            text = torch.cat([text, token_ids(1, 6, seed=turn)], dim=1)
        unread = text[:, cache.get_seq_length() :]
        everything = torch.ones_like(text)  # transformers would take a token 0 that was generated for padding
        text = model.generate(input_ids=text, attention_mask=everything, past_key_values=cache, **GREEDY)
        with torch.no_grad():
            for token in text[0, -25:]:
                unread = model(input_ids=unread, past_key_values=by_hand).logits[:, -1:].argmax(-1)
                assert unread.item() == token
        if memory_size == 200:
            assert torch.equal(text, base_tokens(model, input_ids=text[:, :-25], attention_mask=everything, **GREEDY))
    assert cache.get_seq_length() == text.shape[1] - 1


def test_one_prompt_for_many_questions():
    model = gated_model()
    system = token_ids(1, 30)
    read = BoundedCache(model, memory_size=12)
    read.pin(0, 6)
    with torch.no_grad():
        model(input_ids=system, past_key_values=read)
    for seed in (1, 2):
        ids = torch.cat([system, token_ids(1, 5, seed=seed)], dim=1)
        tokens = model.generate(input_ids=ids, past_key_values=copy.deepcopy(read), **GREEDY)
        again = BoundedCache(model, memory_size=12)
        again.pin(0, 6)
        with torch.no_grad():
            model(input_ids=system, past_key_values=again)
        assert torch.equal(model.generate(input_ids=ids, past_key_values=again, **GREEDY), tokens)
    assert read.get_seq_length() == 30


def test_rows_that_end_early():
    model = gated_model()
    ids = token_ids(3, 8)
    ending = base_tokens(model, input_ids=ids, **GREEDY)[0, 10].item()  # the third token that row 0 makes
    arguments = dict(input_ids=ids, eos_token_id=ending, do_sample=False, max_new_tokens=25)
    cache = BoundedCache(model, memory_size=40)
    assert torch.equal(model.generate(past_key_values=cache, **arguments), base_tokens(model, **arguments))


def test_larger_batch_after_generate():
    model = gated_model()
    cache = BoundedCache(model, memory_size=8)
    model.generate(input_ids=token_ids(1, 5), past_key_values=cache, **GREEDY)
    with pytest.raises(ValueError, match="batch of 1 and got one of 4"):
        model.generate(input_ids=token_ids(4, 40), past_key_values=cache, **GREEDY)


GOES_BACK = ["prompt_lookup_num_tokens", "assistant_early_exit", "use_mtp"]


@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
@pytest.mark.parametrize("name", [*GOES_BACK, "assistant_model"])
def test_decoding_that_goes_back(family, name):
    model = gated_model(family)
    inner = model.base_model.model
    cache = BoundedCache(model, memory_size=8)
    for generate in (model.generate, inner.generate):  # the second knows nothing of our checks
        with pytest.raises(ValueError, match="rolls? the cache back"):
            value = inner if name == "assistant_model" else 1
            generate(input_ids=token_ids(1, 5), past_key_values=cache, **GREEDY, **{name: value})
    assert cache.is_empty


@pytest.mark.parametrize("name", GOES_BACK)
def test_decoding_that_goes_back_by_a_generation_config(name, monkeypatch):
    model = gated_model()
    cache, ids, config = BoundedCache(model, memory_size=8), token_ids(1, 5), GenerationConfig(**{name: 1}, **GREEDY)
    with pytest.raises(ValueError, match=f"{name} means"):
        model.generate(input_ids=ids, generation_config=config, past_key_values=cache)
    with pytest.raises(ValueError, match=f"{name} means"):
        model.generate(ids, config, past_key_values=cache)
    monkeypatch.setattr(model.generation_config, name, 1)
    with pytest.raises(ValueError, match=f"{name} means"):
        model.generate(input_ids=ids, past_key_values=cache, **GREEDY)
    assert cache.is_empty


def test_a_cache_implementation_evicts_nothing(monkeypatch):
    model, ids = gated_model(), token_ids(1, 5)
    for arguments in (dict(), dict(past_key_values=BoundedCache(model, memory_size=8))):
        with pytest.raises(ValueError, match="cache_implementation='static' makes a cache that evicts nothing"):
            model.generate(input_ids=ids, cache_implementation="static", **arguments, **GREEDY)
        with pytest.raises(ValueError, match="cache_implementation='static'"):
            model.generate(ids, GenerationConfig(cache_implementation="static", **GREEDY), **arguments)
    expected = base_tokens(model, input_ids=ids, **GREEDY)
    assert torch.equal(base_tokens(model, input_ids=ids, cache_implementation="static", **GREEDY), expected)
    monkeypatch.setattr(model.generation_config, "cache_implementation", "static")
    with pytest.raises(ValueError, match="of model.generation_config too"):
        model.generate(input_ids=ids, **GREEDY)
    # the default of older Gemmas on the Hub
    monkeypatch.setattr(model.generation_config, "cache_implementation", "hybrid")
    enough = BoundedCache(model, memory_size=40)
    assert torch.equal(model.generate(input_ids=ids, past_key_values=enough, **GREEDY), expected)


@pytest.mark.parametrize(
    "method", ["generate_batch", "init_continuous_batching", "continuous_batching_context_manager"]
)
def test_continuous_batching_is_refused_while_gates_are_on(method, monkeypatch):
    model = gated_model()
    arguments = dict(inputs=token_ids(2, 5).tolist()) if method == "generate_batch" else {}
    for owner in (model, model.base_model):
        with pytest.raises(ValueError, match="Continuous batching .* cannot evict"):
            getattr(owner, method)(**arguments)
    monkeypatch.setattr(type(model.base_model.model), method, lambda self, **given: given)
    with model.disable_adapter():
        assert getattr(model, method)(**arguments) == arguments


def test_without_a_cache_of_ours_nothing_is_evicted_and_that_is_said_once(caplog):
    model, ids = gated_model(), token_ids(1, 5)
    expected = base_tokens(model, input_ids=ids, **GREEDY)
    logger.warning_once.cache_clear()
    with caplog.at_level("WARNING"):
        for arguments in (dict(), dict(past_key_values=DynamicCache()), dict(prompt_lookup_num_tokens=3)):
            assert torch.equal(model.generate(input_ids=ids, **arguments, **GREEDY), expected)
    said = [message for message in caplog.messages if "Retention gates are on" in message]
    assert len(said) == 1
    assert "DynamicCache: nothing is evicted" in said[0] and "BoundedCache(model" in said[0]


def test_bf16_errs_no_more_than_the_base_model():
    model = gated_model().double()
    ids = token_ids(2, 40)
    with torch.no_grad():
        with model.disable_adapter():
            exact = model(input_ids=ids, use_cache=False).logits
            model.bfloat16()
            base_error = (model(input_ids=ids, use_cache=False).logits - exact).abs()
        cache = BoundedCache(model, memory_size=40)
        steps = [model(input_ids=ids[:, t : t + 1], past_key_values=cache).logits for t in range(40)]
    error = (torch.cat(steps, dim=1) - exact).abs()
    assert cache.layers[0].keys.dtype == torch.bfloat16 and cache.layers[0].score.dtype == torch.float32
    assert error.mean() <= 2 * base_error.mean() and error.max() <= 2 * base_error.max()


@torch.no_grad()
def test_padding_that_the_next_turn_tells_of_is_forgotten():
    """A row that ends early is filled up by generate; the next turn's mask says with what."""
    model = gated_model()
    ids = token_ids(2, 24)
    first = torch.ones(2, 16, dtype=torch.long)
    mask = torch.cat([first, torch.ones(2, 8, dtype=torch.long)], dim=1)
    mask[0, 10:16] = 0
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    logits = []
    for cache in (BoundedCache(model, memory_size=64), DynamicCache(config=model.config)):
        model(input_ids=ids[:, :16], attention_mask=first, position_ids=positions[:, :16], past_key_values=cache)
        turn = {"attention_mask": mask, "position_ids": positions[:, 16:], "past_key_values": cache}
        logits.append(model(input_ids=ids[:, 16:], **turn).logits)
    torch.testing.assert_close(logits[0], logits[1], rtol=1e-4, atol=1e-4)


def test_a_later_turn_is_read_in_chunks_only_if_it_is_long(monkeypatch):
    """What the cache has read does not count, and is not read again."""
    before_5_23 = Version(version("transformers")) < generate_arguments.CHUNKS_LATER_TURNS
    monkeypatch.setattr(generate_arguments, "LONG_PROMPT", 16)
    monkeypatch.setattr(generate_arguments, "CHUNK", 4)
    model = gated_model()
    cache = BoundedCache(model, memory_size=60)
    ids = model.generate(input_ids=token_ids(1, 12), past_key_values=cache, **GREEDY)
    asked, given = [], model.get_base_model().generate
    monkeypatch.setattr(
        model.get_base_model(),
        "generate",
        lambda *args, **kwargs: asked.append(kwargs["prefill_chunk_size"]) or given(*args, **kwargs),
    )
    for new in (10,) if before_5_23 else (10, 20):
        ids = torch.cat([ids, token_ids(1, new, seed=new)], dim=1)
        ids = model.generate(input_ids=ids, past_key_values=cache, **GREEDY)
        assert cache.get_seq_length() == ids.shape[1] - 1
    assert asked == ([None] if before_5_23 else [None, 4])
    if not before_5_23:
        monkeypatch.setattr(generate_arguments, "version", lambda name: "5.22.1")
    read, more = cache.get_seq_length(), torch.cat([ids, token_ids(1, 20)], dim=1)
    with pytest.raises(ValueError, match=rf"has read {read} tokens and a further 21 .* transformers>=5.23"):
        model.generate(input_ids=more, past_key_values=cache, **GREEDY)
    assert cache.get_seq_length() == read
