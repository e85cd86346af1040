"""Decoding steps give the same captured and replayed."""

import re
from functools import partial

import pytest
import torch
from captured import GREEDY, assert_same, caches, is_captured, on, padded_batch, three_kinds
from gated_models import token_ids

from retention_gates import find_gated_model
from retention_gates.gates.cache import BoundedCache
from retention_gates.gates.decode.step import logger

BEAMS = dict(num_beams=3, num_return_sequences=2)
FAMILIES = ["llama", "qwen3", "qwen3_moe", "qwen3_next", "gemma2", "gemma3_text", "gpt_oss", "cohere2"]


@pytest.mark.parametrize("family", FAMILIES)
def test_padded_batch(device, family, captures):
    model = on(device, family)
    captured, plain = caches(model)
    assert_same(model, captured, plain, **padded_batch(device), **GREEDY)
    assert len(captures) == 1


@pytest.mark.parametrize("policy", ["key_norm", "random", "streaming_llm", "h2o", "lagkv"])
def test_other_policies(device, policy):
    model = on(device)
    assert_same(model, *caches(model, policy=policy, buffer_size=3), **padded_batch(device), **GREEDY)


@pytest.mark.parametrize("policy", ["rkv", "expected_attention", "triattention", "vase"])
def test_priorities_that_hold_for_several_steps_are_two_kinds_of_step(device, policy, captures):
    model = on(device)
    captured, plain = caches(model, memory_size=20, policy=policy)
    assert captured.gated_layers[0].rule.interval == 8
    assert_same(model, captured, plain, **padded_batch(device), do_sample=False, max_new_tokens=60)
    assert len(captures) == len(captured.decode_step.captures) == 2


def test_a_step_is_called_by_itself_and_through_the_peft_model(device, captures, caplog):
    """PEFT names return_dict=None; and a step that is only opened does not change what the model itself does."""
    model = on(device)
    base, ids = find_gated_model(model).model, token_ids(2, 30).to(device)
    found = []
    for call in ("step", "peft", "model"):
        cache = BoundedCache(model, memory_size=8)
        with torch.no_grad(), caplog.at_level("WARNING"):
            model(input_ids=ids, past_key_values=cache)
            step = cache.decode_step
            ask = step if call == "step" else partial(model, past_key_values=cache)
            with step.in_generate(base, cache, 0) if call == "peft" else step.opened(base, cache):
                token, tokens = ids[:, :1], []
                for position in range(30, 42):
                    positions = torch.full_like(token, position)
                    token = ask(input_ids=token, position_ids=positions).logits[:, -1:].argmax(-1)
                    tokens.append(token)
        found.append(torch.cat(tokens, dim=1))
        assert is_captured(cache) == (call != "model")
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2]) and len(captures) == 2
    assert not [message for message in caplog.messages if "not captured" in message]


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (dict(return_dict=False), "return_dict=False asks for a tuple"),
        (dict(output_hidden_states=True), "output_hidden_states=True asks for more than logits"),
    ],
)
def test_a_step_that_is_not_captured_says_so_once(device, options, reason, caplog):
    model = on(device)
    cache, base = BoundedCache(model, memory_size=8), find_gated_model(model).model
    logger.warning_once.cache_clear()
    with torch.no_grad(), caplog.at_level("WARNING"):
        model(input_ids=token_ids(2, 12).to(device), past_key_values=cache)
        with cache.decode_step.opened(base, cache) as step:
            for position in range(12, 18):
                token = token_ids(2, 1).to(device)
                step(input_ids=token, position_ids=torch.full_like(token, position), **options)
    assert [message for message in caplog.messages if reason in message] == [
        f"A decoding step is not captured, because {reason}."
    ]
    assert not is_captured(cache)


def test_500_steps(device, captures):
    model = on(device, max_position_embeddings=1024)
    ids = token_ids(1, 20).to(device)
    captured, plain = caches(model, memory_size=24, budgets=[[8, 40], [30, 18]])
    assert_same(model, captured, plain, input_ids=ids, do_sample=False, max_new_tokens=501)
    assert len(captures) == 1


@three_kinds
def test_beams(device, family, captures):
    model = on(device, family)
    if family == "qwen3_next":  # as transformers itself does where it samples
        find_gated_model(model).model.set_experts_implementation("batched_mm")
    assert_same(model, *caches(model), **padded_batch(device), **BEAMS, **GREEDY)
    assert len(captures) == 1


def test_beams_over_experts_that_wait_are_not_captured(device, captures, caplog):
    """Beams keep a prompt's experts: as "eager" does, CUDA's grouped_mm in fp32 asks how many tokens each got."""
    model = on(device, "qwen3_next")
    find_gated_model(model).model.set_experts_implementation("grouped_mm" if device == "cuda" else "eager")
    logger.warning_once.cache_clear()
    with caplog.at_level("WARNING"):
        captured, plain = (
            model.generate(past_key_values=cache, **padded_batch(device), **BEAMS, **GREEDY) for cache in caches(model)
        )
    assert torch.equal(captured, plain) and not captures
    said = [message for message in caplog.messages if "without a CUDA graph" in message]
    assert len(said) == 1 and re.search("waits for the device|_local_scalar_dense|nonzero", said[0])


def test_sampling_and_outputs(device):
    model, found = on(device), []
    ids = token_ids(2, 12).to(device)
    for cache in caches(model):
        torch.manual_seed(0)
        options = dict(do_sample=True, num_return_sequences=2, max_new_tokens=20, return_dict_in_generate=True)
        found.append(model.generate(input_ids=ids, past_key_values=cache, output_logits=True, **options))
    assert torch.equal(found[0].sequences, found[1].sequences)
    for ours, theirs in zip(found[0].logits, found[1].logits, strict=True):
        torch.testing.assert_close(ours, theirs)


@three_kinds
def test_turns_with_one_cache_after_rows_that_ended_early(device, family, captures):
    """A row that ends early is filled up; the next turn's mask tells with what."""
    model = on(device, family)
    captured, plain = caches(model, memory_size=10)
    arguments = padded_batch(device)
    alone = model.generate(past_key_values=BoundedCache(model, 10), **arguments, **GREEDY)
    ending = alone[0, 12 + 6].item()
    text = assert_same(model, captured, plain, **arguments, eos_token_id=ending, pad_token_id=0, **GREEDY)
    made = len(captures)
    for turn in range(2):
        filled = torch.ones_like(text)
        filled[:, :12] = arguments["attention_mask"]
        if turn == 0:
            filled[0, 19:] = 0
        more = token_ids(2, 1 + 4 * turn, seed=turn).to(device)  # a turn of one token is no step of `generate`
        mask = torch.cat([filled, torch.ones_like(more)], dim=1)
        ids = torch.cat([text, more], dim=1)
        text = assert_same(model, captured, plain, input_ids=ids, attention_mask=mask, **GREEDY)
        arguments["attention_mask"] = mask[:, :12]
    assert len(captures) == made


@pytest.mark.parametrize("size", [1, 5])
def test_chunked_prefill(device, size):
    """A chunk of one token is a step in form, but not all of its rows are real."""
    model = on(device)
    assert_same(model, *caches(model), **padded_batch(device), prefill_chunk_size=size, **GREEDY)


@three_kinds
def test_reset_keeps_the_capture(device, family, captures):
    model = on(device, family)
    captured, plain = caches(model)
    for _ in range(2):
        assert_same(model, captured, plain, **padded_batch(device), **GREEDY)
        captured.reset()
        plain.reset()
    assert len(captures) == 1


@three_kinds
def test_replays_are_counted_and_what_they_leave_can_be_saved(device, captures, tmp_path, family):
    model = on(device, family)
    captured, plain = caches(model)
    ids = token_ids(1, 9).to(device)
    for cache in (captured, plain):
        model.generate(input_ids=ids, past_key_values=cache, **GREEDY)
        assert {layer.columns for layer in cache.gated_layers} == {int(cache.get_seq_length())} == {9 + 15}
    assert captures
    captured.save(tmp_path / "memory")
    loaded = BoundedCache.load(model, tmp_path / "memory")
    seen = torch.ones(1, 24 + 9, dtype=torch.long, device=device)
    one, other = (
        model.generate(input_ids=ids, attention_mask=seen, past_key_values=cache, **GREEDY)
        for cache in (loaded, plain)
    )
    assert torch.equal(one, other)


def test_a_replay_that_cannot_be_counted_is_refused(device, captures):
    model = on(device)
    cache = caches(model)[0]
    model.generate(input_ids=token_ids(1, 9).to(device), past_key_values=cache, **GREEDY)
    for layer in cache.gated_layers:
        layer.columns = 2**24 - 20
    with pytest.raises(ValueError, match="would pass 16777216"):
        seen = torch.ones(1, 24 + 9, dtype=torch.long, device=device)
        model.generate(input_ids=token_ids(1, 9).to(device), attention_mask=seen, past_key_values=cache, **GREEDY)
    assert {layer.columns for layer in cache.gated_layers} == {2**24}


def test_global_budgets_are_not_captured(device, captures):
    model = on(device)
    cache = caches(model, budgets="global")[0]
    model.generate(input_ids=token_ids(1, 9).to(device), past_key_values=cache, **GREEDY)
