"""BoundedCache: what it keeps, what its queries see, what it holds, and what it refuses."""

import copy
import gc

import pytest
import torch
from cache_cases import CHUNKS, SCORED, check_run
from gated_models import gated_model, step_by_step, token_ids
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import DynamicCache

from retention_gates import RetentionGateConfig, find_gated_model
from retention_gates.gates.cache import BoundedCache
from retention_gates.gates.cache.slot_layer import SlotLayer
from retention_gates.gates.policies import POLICIES


@st.composite
def runs(draw):
    heads = draw(st.integers(1, 3))
    protected = [(0, draw(st.integers(0, 2)))]
    if draw(st.booleans()):
        start = draw(st.integers(0, 15))
        protected.append((start, start + draw(st.integers(1, 3))))
    least = sum(stop - start for start, stop in protected) + 1
    return dict(
        budgets=tuple(draw(st.lists(st.integers(least, 14), min_size=heads, max_size=heads))),
        protected=tuple(protected),
        buffer_size=draw(st.integers(1, 4)),
        policy=draw(st.sampled_from(SCORED)),
        chunks=draw(st.lists(st.sampled_from(CHUNKS), min_size=1, max_size=20)),
        padding=draw(st.integers(0, 10)),
        group=draw(st.integers(1, 3)),
        values=draw(st.integers(1, 8)),
        seed=draw(st.integers(0, 2**31)),
    )


@given(runs())
@settings(max_examples=60)
def test_keeps_and_shows_what_plain_python_does(run):
    check_run(run)


@pytest.mark.parametrize("budgets", ["uniform", [[5, 11], [20, 4], [7, 9], [3, 5]]])
def test_bytes_held_are_slots_times_bytes_per_entry(budgets):
    model = gated_model()
    cache = BoundedCache(model, memory_size=8, budgets=budgets, buffer_size=2)
    assert cache.memory_bytes() == 0 and cache.slots == 4 * 2 * 10
    entry = 2 * 8 * 4 + 4 + 8 + 1  # key and value of 8 fp32, score, position, pending
    counters = 4 * (3 * 8 + 8 + 2 * 8)  # per layer: where each row starts, the columns so far, the span protected
    for length in (200, 1, 1, 30, 1):
        with torch.no_grad():
            model(input_ids=token_ids(3, length), past_key_values=cache)
        assert cache.memory_bytes() == 3 * cache.slots * entry + counters
        state = [t for layer in cache.layers for t in vars(layer).values() if isinstance(t, torch.Tensor)]
        tensors = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in state}
        assert sum(tensors.values()) == cache.memory_bytes()
        for layer, row in zip(cache.layers, cache.budgets, strict=True):
            for head, budget in enumerate(row):
                assert layer.positions(head).ge(0).sum(1).max() <= budget + 1


@pytest.mark.parametrize(("policy", "numbers"), [("h2o", 1), ("snapkv", 32), ("keydiff", 8)])
def test_bytes_held_count_what_a_policy_writes_beside_the_entries(policy, numbers):
    model = gated_model()
    plain, cache = BoundedCache(model, memory_size=8), BoundedCache(model, memory_size=8, policy=policy)
    for one in (plain, cache):
        step_by_step(model, token_ids(3, 20), one)
    assert cache.memory_bytes() == plain.memory_bytes() + 3 * cache.slots * numbers * 4


def test_sliding_layers_keep_their_own_cache():
    model = gated_model("gemma3_text")
    cache = BoundedCache(model, memory_size=8)
    plain = DynamicCache(config=model.config)
    for ours, theirs in zip(cache.layers[::2], plain.layers[::2], strict=True):
        assert isinstance(ours, type(theirs)) and ours.sliding_window == theirs.sliding_window == 8
    assert all(isinstance(layer, SlotLayer) for layer in cache.layers[1::2])
    with torch.no_grad():
        model(input_ids=token_ids(1, 100), past_key_values=cache)
    assert cache.layers[0].keys.shape[2] == 8 and cache.get_max_length() == -1
    slots = sum(layer.memory_bytes() for layer in cache.gated_layers)
    assert cache.memory_bytes() >= slots + 2 * 2 * 8 * 2 * 8 * 4


def test_layers_without_a_gate_keep_everything():
    from peft import get_peft_model
    from tiny_models import tiny_model

    model = get_peft_model(tiny_model(), RetentionGateConfig(gate_width=8, layers_to_transform=[1, 2])).eval()
    cache = BoundedCache(model, memory_size=8)
    with torch.no_grad():
        model(input_ids=token_ids(1, 30), past_key_values=cache)
    assert [layer.keys.shape[-2] for layer in cache.layers] == [30, 18, 18, 30]


@pytest.mark.parametrize("policy", sorted(POLICIES))
def test_left_padding_changes_nothing(policy):
    model = gated_model()
    ids = token_ids(2, 40)
    mask = torch.ones_like(ids)
    mask[1, :13] = 0
    cache = BoundedCache(model, memory_size=9, policy=policy, protected_tokens=1)
    cache.pin(3, 5)
    alone = copy.deepcopy(cache)
    with torch.no_grad():
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        batch = model(
            input_ids=ids[:, :25], past_key_values=cache, attention_mask=mask[:, :25], position_ids=positions[:, :25]
        ).logits
        row = model(input_ids=ids[1:, 13:25], past_key_values=alone).logits
        torch.testing.assert_close(batch[1:, 13:], row, rtol=1e-4, atol=1e-4)
        for t in range(25, 40):
            one = slice(t, t + 1)
            batch = model(
                input_ids=ids[:, one],
                past_key_values=cache,
                attention_mask=mask[:, : t + 1],
                position_ids=positions[:, one],
            ).logits
            row = model(input_ids=ids[1:, one], past_key_values=alone).logits
            torch.testing.assert_close(batch[1:], row, rtol=1e-4, atol=1e-4)
    for layer, lonely in zip(cache.layers, alone.layers, strict=True):
        for head in (0, 1):
            assert torch.equal(layer.positions(head)[1] - 13, lonely.positions(head)[0])


def test_a_prompt_sees_what_the_base_model_sees():
    model = gated_model()
    ids = token_ids(2, 30)
    with torch.no_grad():
        with model.disable_adapter():
            base = model(input_ids=ids, use_cache=False).logits
        assert torch.equal(model(input_ids=ids, past_key_values=BoundedCache(model, memory_size=5)).logits, base)


def test_pinned_tokens_stay():
    model = gated_model()
    cache = BoundedCache(model, memory_size=12)
    cache.pin(10, 14)
    with torch.no_grad():
        model(input_ids=token_ids(2, 20), past_key_values=cache)
        cache.pin(0, 1)  # protected already
        with pytest.raises(ValueError, match="has evicted"):
            cache.pin(3, 6)
        held = set.intersection(
            *({int(p) for p in layer.positions(h)[b]} for layer in cache.layers for h in (0, 1) for b in (0, 1))
        )
        assert {0, 1, 10, 11, 12, 13} <= held
        cache.pin(20, 22)  # still to come
        model(input_ids=token_ids(2, 1), past_key_values=cache)
        for _ in range(60):
            model(input_ids=token_ids(2, 1), past_key_values=cache)
    for layer in cache.layers:
        for head in (0, 1):
            for row in layer.positions(head):
                assert {0, 1, 10, 11, 12, 13, 20, 21} <= set(row.tolist())
    with pytest.raises(ValueError, match="needs 13 entries"):
        cache.pin(30, 34)


def test_pin_right_after_reading():
    model = gated_model()
    cache = BoundedCache(model, memory_size=12)
    with torch.no_grad():
        model(input_ids=token_ids(1, 12), past_key_values=cache)
        cache.pin(4, 9)
        model(input_ids=token_ids(1, 50), past_key_values=cache)
        step_by_step(model, token_ids(1, 30), cache)
    for layer in cache.layers:
        assert {0, 1, 4, 5, 6, 7, 8} <= set(layer.positions(0)[0].tolist())


def test_pin_makes_room_in_calibrated_budgets():
    model = gated_model()
    shares = [[1.0, 2.0], [1.0, 50.0], [0.5, 1.0], [9.0, 9.0]]
    find_gated_model(model).active_config.budget_shares = shares
    cache = BoundedCache(model, memory_size=16)
    assert min(min(row) for row in cache.budgets) == 12
    cache.pin(2, 15)
    assert min(min(row) for row in cache.budgets) == 16 and sum(map(sum, cache.budgets)) == 16 * 8
    with pytest.raises(ValueError, match="at least 17"):
        cache.pin(2, 16)
    cache = BoundedCache(model, memory_size=40)
    before = cache.budgets
    with torch.no_grad():
        model(input_ids=token_ids(1, 5), past_key_values=cache)
        with pytest.raises(ValueError, match="Pin before the first token"):
            cache.pin(2, 20)
        assert cache.budgets == before
        cache.reset()
        cache.pin(2, 20)
        model(input_ids=token_ids(1, 5), past_key_values=cache)
    assert cache.memory_bytes() > 0 and min(min(row) for row in cache.budgets) == 21


def test_budgets_follow_the_adapter():
    model = gated_model()
    assert BoundedCache(model, 16).budgets == [[16, 16]] * 4
    with pytest.raises(ValueError, match="retention-gates calibrate"):
        BoundedCache(model, 16, budgets="calibrated")
    find_gated_model(model).active_config.budget_shares = [[1.0, 30.0]] * 4
    assert BoundedCache(model, 16).budgets == [[12, 20]] * 4
    assert BoundedCache(model, 16, budgets="uniform").budgets == [[16, 16]] * 4


@pytest.mark.parametrize("policy", ["retention", "h2o", "snapkv"])
def test_reset_is_a_new_cache_in_the_same_memory(policy):
    model = gated_model()
    cache = BoundedCache(model, memory_size=6, policy=policy)
    first = step_by_step(model, token_ids(2, 20), cache)
    address = cache.layers[0].keys.data_ptr()
    cache.reset()
    assert cache.is_empty and (cache.layers[0].positions(0) == -1).all()
    assert torch.equal(step_by_step(model, token_ids(2, 20), cache), first)
    assert cache.layers[0].keys.data_ptr() == address


@pytest.mark.parametrize("policy", ["retention", "h2o", "snapkv"])
def test_rows_can_be_chosen_repeated_and_reordered(policy):
    model = gated_model()
    prompt, rest = token_ids(2, 20), token_ids(3, 10, seed=1)
    cache = BoundedCache(model, memory_size=6, policy=policy)
    step_by_step(model, prompt, cache)
    chosen, repeated, reordered = (copy.deepcopy(cache) for _ in range(3))
    chosen.batch_select_indices(torch.tensor([1]))
    repeated.batch_repeat_interleave(2)
    reordered.reorder_cache(torch.tensor([1, 1]))
    one = step_by_step(model, rest[:1], chosen)
    torch.testing.assert_close(step_by_step(model, rest[:1].expand(2, -1), reordered), one.expand(2, -1, -1))
    assert repeated.batch_size == 4
    torch.testing.assert_close(step_by_step(model, rest[:1].expand(4, -1), repeated)[2:], one.expand(2, -1, -1))


def test_copies_are_independent_and_do_not_hold_the_model():
    model = gated_model()
    cache = BoundedCache(model, memory_size=6)
    step_by_step(model, token_ids(1, 20), cache)
    fork = copy.deepcopy(cache)
    left = step_by_step(model, token_ids(1, 20, seed=1), fork)
    assert torch.equal(step_by_step(model, token_ids(1, 20, seed=1), cache), left)
    owner = cache.layers[0].owner
    assert fork.layers[0].owner() is owner()
    del model
    gc.collect()
    assert owner() is None


def test_begun_in_inference_mode_and_used_outside():
    model = gated_model()
    cache = BoundedCache(model, memory_size=6)
    with torch.inference_mode():
        model(input_ids=token_ids(1, 10), past_key_values=cache)
    step_by_step(model, token_ids(1, 10), cache)
    assert cache.get_seq_length() == 20
