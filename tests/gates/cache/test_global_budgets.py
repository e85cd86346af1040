"""budgets="global": one pool for all heads of all layers, held against a simulation in plain Python."""

import math

import numpy as np
import pytest
import torch
from gated_models import gated_model, step_by_step, token_ids
from hypothesis import given, settings
from hypothesis import strategies as st
from layer_calls import attend
from torch import nn

from retention_gates.gates.cache import BoundedCache
from retention_gates.gates.cache import pool as pool_module
from retention_gates.gates.cache.pool import Pool
from retention_gates.gates.cache.pool_layer import PoolLayer
from retention_gates.gates.policies import POLICIES, NewTokens
from retention_gates.gates.policies.eviction_rule import EvictionRule
from retention_gates.gates.simulation.simulated_cache import SimulatedCache

OWNER = nn.Identity()


class PlainPool:
    """What one row holds, as a list of (layer, head, position, score), by the rule as it is written."""

    def __init__(self, heads: int, total: int, room: int, most: int, linear_in_age: bool):
        self.heads, self.total, self.room, self.most, self.linear_in_age = heads, total, room, most, linear_in_age
        self.held: list[tuple[int, int, int, float]] = []

    def order(self, entry, step, recent):
        layer, head, position, score = entry
        age = step - position
        # in fp32, where other products are equal than in the fp64 of Python
        priority = score if math.isinf(score) or not self.linear_in_age else float(np.float32(age) * np.float32(score))
        return (math.inf if age < recent else priority, position, layer, head)

    def cut(self, new, step, recent):
        self.held += new
        for layer in {entry[0] for entry in self.held}:
            own = sorted((e for e in self.held if e[0] == layer), key=lambda e: self.order(e, step, recent))
            for entry in own[: max(0, len(own) - self.most)]:
                self.held.remove(entry)
        if len(self.held) >= self.total + self.room:
            self.held.sort(key=lambda entry: self.order(entry, step, recent))
            del self.held[: len(self.held) - self.total]


@st.composite
def runs(draw):
    return dict(
        layers=draw(st.integers(1, 4)),
        heads=draw(st.integers(1, 3)),
        memory_size=draw(st.integers(4, 9)),
        buffer_size=draw(st.integers(1, 3)),
        most_of_layer=draw(st.sampled_from([1, 2, 8])),
        policy=draw(st.sampled_from(["retention", "streaming_llm", "random"])),
        chunks=draw(st.lists(st.sampled_from([1, 1, 1, 2, 7, 25]), min_size=1, max_size=15)),
        padding=draw(st.integers(0, 10)),
        group=draw(st.integers(1, 2)),
        values=draw(st.integers(1, 8)),
        seed=draw(st.integers(0, 2**31)),
    )


@given(runs())
@settings(max_examples=50)
def test_keeps_and_shows_what_plain_python_does(run):
    layers, heads, memory_size, policy = run["layers"], run["heads"], run["memory_size"], POLICIES[run["policy"]]
    tokens, group, buffer_size = sum(run["chunks"]), run["group"], run["buffer_size"]
    generator = torch.Generator().manual_seed(run["seed"])
    # few values, so that products are often equal
    log_beta = -torch.randint(0, run["values"] + 1, (layers, 2, heads, tokens), generator=generator) / 7.0
    key, value = torch.randn(2, layers, 2, heads, tokens, 4, generator=generator)
    query = torch.randn(layers, 2, heads * group, tokens, 4, generator=generator)
    padding = torch.tensor([0, min(run["padding"], tokens)])
    valid = torch.arange(tokens) >= padding[:, None]
    offset = torch.arange(tokens) - padding[:, None]
    before, pool_module.MOST_OF_LAYER = pool_module.MOST_OF_LAYER, run["most_of_layer"]
    pool = Pool(layers, heads, memory_size, buffer_size, policy.linear_in_age)
    pool_module.MOST_OF_LAYER = before
    protected, score, rule = ((0, 2),), [], None
    caches = []
    for layer in range(layers):
        rule = EvictionRule(policy, (memory_size,) * heads, buffer_size, protected, run["seed"], layer, is_pooled=True)
        caches.append(PoolLayer(rule, OWNER))
        caches[-1].join(pool, layer)
        own = policy.score(NewTokens(log_beta[layer], key[layer], value[layer], offset, run["seed"], layer))
        score.append(own.masked_fill((offset < 2)[:, None], math.inf))
    recent = rule.recent(torch.device("cpu"))
    recent = 0 if recent is None else int(recent[0])
    plain = [PlainPool(heads, pool.total, pool.room, pool.most, policy.linear_in_age) for _ in range(2)]
    first = 0
    for length in run["chunks"]:
        now = slice(first, first + length)
        mask = valid[:, : now.stop] if bool(padding.any()) or run["seed"] % 2 else None
        visible = torch.zeros(layers, 2, heads, length, tokens, dtype=torch.bool)
        for row in range(2):
            new = [
                (layer, head, position, float(score[layer][row, head, position]))
                for layer in range(layers)
                for head in range(heads)
                for position in range(*now.indices(tokens))
                if valid[row, position]
            ]
            for layer, head, position, _ in plain[row].held:
                visible[layer, row, head, :, position] = True
            for layer, head, position, _ in new:
                visible[layer, row, head, position - first :, position] = True
            plain[row].cut(new, now.stop - 1, recent)
        for layer, cache in enumerate(caches):
            new = (each[layer][:, :, now] for each in (log_beta, query, key, value))
            found = attend(cache, OWNER, *new, mask)
            logits = query[layer][:, :, now].unflatten(1, (heads, group)) @ key[layer][:, :, None].mT * 0.5
            weights = logits.masked_fill(~visible[layer][:, :, None], -math.inf).softmax(-1).nan_to_num()
            expected = (weights @ value[layer][:, :, None]).flatten(1, 2)
            is_real = valid[:, None, now, None]  # what a query of padding sees counts for nothing
            torch.testing.assert_close(found * is_real, expected * is_real, rtol=1e-4, atol=1e-5)
        first += length
        for layer, cache in enumerate(caches):
            for head in range(heads):
                for row in range(2):
                    held = [p for p in cache.positions(head)[row].tolist() if p >= 0]
                    assert held == sorted(e[2] for e in plain[row].held if e[:2] == (layer, head))
        assert int(caches[0].get_seq_length()) == first


@torch.no_grad()
def test_in_a_model_the_pool_never_holds_more_and_heads_differ():
    model = gated_model()
    cache = BoundedCache(model, memory_size=8, budgets="global")
    assert cache.slots == 8 * (8 + 1) and cache.budgets == [[8, 8]] * 4 and cache.memory_bytes() == 0
    for ids in token_ids(2, 90).split([40, 1, 1, 30, 1, 17], dim=1):
        model(input_ids=ids, past_key_values=cache)
        counts = torch.stack([(layer.positions(h) >= 0).sum(1) for layer in cache.layers for h in (0, 1)])
        assert counts.sum(0).tolist() == [64, 64]
    assert counts.max() > 12 and counts.min() < 6
    entry = 2 * 8 * 4 + 4 + 3 * 8  # key and value of 8 fp32; score; position, owner, order
    assert cache.memory_bytes() == 2 * 72 * entry + 2 * (5 + 1) * 8 + 8


def test_generate_reset_beams_and_enough_memory():
    model = gated_model()
    ids = token_ids(2, 12)
    cache = BoundedCache(model, memory_size=60, budgets="global")
    greedy = dict(do_sample=False, max_new_tokens=20)
    with model.disable_adapter():
        expected = model.generate(input_ids=ids, **greedy)
        beams = model.generate(input_ids=ids, num_beams=3, **greedy)
    assert torch.equal(model.generate(input_ids=ids, past_key_values=cache, **greedy), expected)
    cache.reset()
    assert cache.is_empty and torch.equal(model.generate(input_ids=ids, past_key_values=cache, **greedy), expected)
    cache = BoundedCache(model, memory_size=60, budgets="global")
    assert torch.equal(model.generate(input_ids=ids, past_key_values=cache, num_beams=3, **greedy), beams)


@torch.no_grad()
def test_pins_stay_and_forks_are_independent():
    model = gated_model()
    cache = BoundedCache(model, memory_size=12, budgets="global")
    cache.pin(10, 14)
    model(input_ids=token_ids(2, 20), past_key_values=cache)
    with pytest.raises(ValueError, match="has evicted"):
        cache.pin(3, 6)
    cache.pin(20, 22)  # still to come
    fork = cache.fork()
    one, other = (step_by_step(model, token_ids(2, 40, seed=2), each) for each in (cache, fork))
    assert torch.equal(one, other) and fork.layers[3].pool is fork.layers[0].pool is not cache.layers[0].pool
    for layer in cache.layers:
        for head in (0, 1):
            for row in layer.positions(head):
                assert {0, 1, 10, 11, 12, 13, 20, 21} <= set(row.tolist())


def test_what_global_budgets_refuse():
    model = gated_model()
    with pytest.raises(ValueError, match="score known ahead, and policy='h2o' has none"):
        BoundedCache(model, memory_size=8, budgets="global", policy="h2o")
    with pytest.raises(ValueError, match="spans are reserved"):
        BoundedCache(model, memory_size=8, budgets="global", reserved=[(0, 5, 2)])
    with pytest.raises(ValueError, match="no simulation|cannot follow"):
        SimulatedCache(model, memory_size=8, budgets="global")
