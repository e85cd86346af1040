"""SimulatedCache in one forward pass equals BoundedCache token by token."""

from dataclasses import replace

import pytest
import torch
from gated_models import gated_model, token_ids

from retention_gates.gates.cache import BoundedCache
from retention_gates.gates.policies import POLICIES
from retention_gates.gates.simulation.simulated_cache import SimulatedCache

RAGGED, PER_LAYER = [[5, 20], [17, 14]], [[8, 8], [20, 20]]


def two_layers():
    return gated_model(num_hidden_layers=2)


def held_after(layer, step, head):
    """Positions held between step and step + 1, as a set per row."""
    times = layer.eviction_times[:, head]
    columns = torch.arange(times.shape[1])
    return [set(columns[(columns <= step) & (row > step + 1)].tolist()) for row in times]


def compare(model, ids, mask=None, tolerance=1e-4, pin=None, **arguments):
    simulated, bounded = SimulatedCache(model, **arguments), BoundedCache(model, **arguments)
    if pin:
        simulated.pin(*pin)
        bounded.pin(*pin)
    positions = None if mask is None else (mask.cumsum(1) - 1).clamp(min=0)
    real = torch.ones_like(ids).bool() if mask is None else mask.bool()
    evicted = 0
    with torch.no_grad():
        whole = model(input_ids=ids, past_key_values=simulated, attention_mask=mask, position_ids=positions).logits
        for t in range(ids.shape[1]):
            one = slice(t, t + 1)
            logits = model(
                input_ids=ids[:, one],
                past_key_values=bounded,
                attention_mask=None if mask is None else mask[:, : t + 1],
                position_ids=None if positions is None else positions[:, one],
            ).logits
            rows = real[:, t]
            torch.testing.assert_close(whole[rows, t], logits[rows, 0], rtol=tolerance, atol=tolerance)
            if t == ids.shape[1] - 1:
                break  # eviction times do not tell what the last step evicts
            for layer, held in zip(simulated.gated_layers, bounded.gated_layers, strict=True):
                for head in range(2):
                    sets = [{int(p) for p in row if p >= 0} for row in held.positions(head)]
                    assert held_after(layer, t, head) == sets
                    evicted += t + 1 - len(sets[0])
    assert evicted > 0
    return whole


@pytest.mark.parametrize("policy", sorted(POLICIES))
def test_equals_step_by_step(policy):
    mask = torch.ones(2, 45, dtype=torch.int64)
    mask[1, :11] = 0
    budgets = PER_LAYER if getattr(POLICIES[policy], "same_for_all_heads", False) else RAGGED
    pin = (2, 4) if policy == "citrus" else None
    compare(two_layers(), token_ids(2, 45), mask, memory_size=14, policy=policy, budgets=budgets, seed=3, pin=pin)


@pytest.mark.parametrize("policy", ["rkv", "expected_attention", "triattention", "vase"])
def test_priorities_that_hold_for_some_steps(policy):
    # with budgets as small as in the test above they are computed at every step
    mask = torch.ones(2, 60, dtype=torch.int64)
    mask[1, :11] = 0
    budgets = [[18, 30], [26, 22]]
    compare(two_layers(), token_ids(2, 60), mask, memory_size=24, policy=policy, budgets=budgets)


@pytest.mark.parametrize("policy", ["retention", "key_norm", "h2o", "keydiff"])
def test_adaptive_budgets(policy):
    mask = torch.ones(2, 40, dtype=torch.int64)
    mask[1, :7] = 0
    compare(two_layers(), token_ids(2, 40), mask, memory_size=9, policy=policy, budgets="adaptive", buffer_size=2)


@pytest.mark.parametrize("budgets", ["uniform", "adaptive"])
def test_reserved_spans(budgets):
    mask = torch.ones(2, 40, dtype=torch.int64)
    mask[1, :7] = 0
    arguments = dict(memory_size=12, policy="retention", budgets=budgets, reserved=[(4, 9, 2), (12, 20, 3)])
    compare(two_layers(), token_ids(2, 40), mask, **arguments)


@pytest.mark.parametrize("family", ["gemma2", "gemma3_text", "gpt_oss", "phi3"])
def test_families(family):
    # softcap, sliding layers in between, sinks, one projection for q, k and v
    compare(gated_model(family), token_ids(2, 40), memory_size=7)


def test_linear_attention_in_between():
    # the recurrent layers of qwen3_next add up in another order step by step
    compare(gated_model("qwen3_next"), token_ids(1, 40), memory_size=7, tolerance=2e-3)


@pytest.mark.parametrize("policy", ["retention", "h2o", "snapkv"])
@pytest.mark.parametrize("buffer_size", [2, 5])
def test_buffers_and_pins(buffer_size, policy):
    compare(two_layers(), token_ids(2, 40), memory_size=9, buffer_size=buffer_size, pin=(6, 9), policy=policy)


@pytest.mark.parametrize("policy", sorted(POLICIES))
def test_side_by_side_is_one_by_one(policy):
    model, ids = two_layers(), token_ids(2, 40)
    mask = torch.ones(2, 40, dtype=torch.int64)
    mask[1, :9] = 0

    def make(**setting):
        cache = SimulatedCache(model, **setting)
        cache.pin(3, 5)
        return cache

    settings = [dict(memory_size=m, policy=p) for p in (policy, "streaming_llm", "tova") for m in (12, 7, 40)]
    with torch.no_grad():
        alone = [make(**setting) for setting in settings]
        logits = [model(input_ids=ids, past_key_values=cache, attention_mask=mask).logits for cache in alone]
        together = SimulatedCache.side_by_side([make(**setting) for setting in settings])
        beside = model(input_ids=ids.repeat(9, 1), past_key_values=together, attention_mask=mask.repeat(9, 1)).logits
    for index, (expected, cache) in enumerate(zip(logits, alone, strict=True)):
        rows = slice(2 * index, 2 * index + 2)
        torch.testing.assert_close(beside[rows][mask.bool()], expected[mask.bool()], rtol=1e-4, atol=1e-4)
        for layer, lonely in zip(together.gated_layers, cache.gated_layers, strict=True):
            assert torch.equal(layer.eviction_times[rows], lonely.eviction_times)
    with pytest.raises(ValueError, match="before they stand side by side"):
        together.pin(2, 3)
    fresh = SimulatedCache.side_by_side([SimulatedCache(model, **setting) for setting in settings])
    with pytest.raises(ValueError, match="9 caches side by side and got a batch of 2"):
        model(input_ids=ids, past_key_values=fresh)


@pytest.mark.parametrize("family", ["gemma2", "gpt_oss"])
def test_attention_that_policies_see_has_softcaps_and_sinks(family):
    compare(gated_model(family), token_ids(2, 30), memory_size=7, policy="h2o")


def test_more_tokens_than_one_block_of_queries():
    # the attention of a simulated sequence goes through queries by the hundred
    model, ids = two_layers(), token_ids(1, 300)
    for policy in ("retention", "tova"):
        cache = SimulatedCache(model, memory_size=20, policy=policy)
        with torch.no_grad():
            whole = model(input_ids=ids, past_key_values=cache).logits
            beginning = model(
                input_ids=ids[:, :200], past_key_values=SimulatedCache(model, memory_size=20, policy=policy)
            ).logits
        torch.testing.assert_close(whole[:, :200], beginning, rtol=1e-4, atol=1e-4)
        for layer in cache.gated_layers:
            columns = torch.arange(300)
            held = (columns[:, None] >= columns) & (columns[:, None] < layer.eviction_times[0, :, None])
            assert (held.sum(2) == (columns + 1).clamp(max=21)).all()


def test_more_memory_than_tokens_is_the_base_model():
    model = gated_model()
    ids = token_ids(2, 20)
    with torch.no_grad():
        simulated = model(input_ids=ids, past_key_values=SimulatedCache(model, memory_size=20)).logits
        with model.disable_adapter():
            torch.testing.assert_close(simulated, model(input_ids=ids, use_cache=False).logits, rtol=1e-4, atol=1e-4)


def test_one_sequence_in_one_pass():
    model = gated_model()
    cache = SimulatedCache(model, memory_size=8)
    with torch.no_grad():
        first = model(input_ids=token_ids(2, 30), past_key_values=cache).logits
        with pytest.raises(ValueError, match="one forward pass"):
            model(input_ids=token_ids(2, 1), past_key_values=cache)
        with pytest.raises(ValueError, match="has evicted"):
            cache.pin(0, 1)
        cache.reset()
        again = model(input_ids=token_ids(2, 30), past_key_values=cache).logits
    assert torch.equal(first, again)


def test_bad_arguments_are_those_of_the_bounded_cache():
    with pytest.raises(ValueError, match="memory_size=0"):
        SimulatedCache(gated_model(), memory_size=0)


@pytest.mark.gpu
@pytest.mark.parametrize(
    "policy", ["h2o", "snapkv", "rkv", "lagkv", "expected_attention", "triattention", "vase", "merging"]
)
def test_captured_steps_are_the_steps(policy):
    plain = replace(POLICIES[policy], reads_back=True)  # which no graph is captured of
    model, ids = gated_model().cuda(), token_ids(2, 80).cuda()
    caches = [SimulatedCache(model, memory_size=24, policy=one) for one in (POLICIES[policy], plain)]
    with torch.no_grad():
        captured, stepped = (model(input_ids=ids, past_key_values=cache).logits for cache in caches)
    torch.testing.assert_close(captured, stepped)
    for one, other in zip(*(cache.gated_layers for cache in caches), strict=True):
        assert torch.equal(one.eviction_times, other.eviction_times) and (one.eviction_times < 80).any()


@pytest.mark.gpu
def test_policies_in_streams_of_their_own():
    names, model = ["h2o", "tova", "snapkv", "rkv", "morphkv"], gated_model().cuda()
    ids = token_ids(2, 200).repeat(2 * len(names), 1).cuda()
    seen = []
    for reads_back in (False, True):
        policies = [replace(POLICIES[name], reads_back=reads_back) for name in names]
        caches = [SimulatedCache(model, memory_size=m, policy=policy) for policy in policies for m in (24, 40)]
        together = SimulatedCache.side_by_side(caches)
        with torch.no_grad():
            logits = model(input_ids=ids, past_key_values=together).logits
        seen.append([logits, *(layer.eviction_times for layer in together.gated_layers)])
    for one, other in zip(*seen, strict=True):
        assert torch.equal(one, other)
