"""Policies against the presses of kvpress 0.5.5, as tests/support/make_kvpress_fixtures.py recorded them.

A press looks at a whole prompt once; so does a policy whose head has read the prompt and evicted nothing yet.
"""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from retention_gates.gates.cache import feedback
from retention_gates.gates.cache.budgets import pyramid_budgets
from retention_gates.gates.policies import POLICIES, Held, NewTokens, Setting
from retention_gates.kernels.ragged_decode_attention import entry_weights
from retention_gates.kernels.softmax import Softmax

RECORDED = load_file(Path(__file__).parents[2] / "fixtures" / "kvpress.safetensors")
HEADS, TOKENS, HEAD_DIM = RECORDED["key"].shape
GROUP = len(RECORDED["query"]) // HEADS
SCALE = HEAD_DIM**-0.5


def after_prompt(name: str, budget: int = 64) -> Held:
    """What the recorded layer's heads hold after all tokens, seen by the policy in blocks of 20 queries."""
    query, key, value = (RECORDED[part][None] for part in ("query", "key", "value"))
    columns = torch.arange(TOKENS)
    new = NewTokens(torch.zeros(1, HEADS, TOKENS), key, value, columns[None], seed=0, layer=0)
    policy = POLICIES[name]
    head_state = torch.zeros(1, HEADS, policy.head_state_size(HEAD_DIM, GROUP))
    held = Held(
        columns.expand(1, HEADS, -1),
        policy.initial_state(new),
        head_state,
        query,
        torch.ones(1, TOKENS).bool(),
        columns[-1],
        torch.zeros(1, dtype=torch.int64),
        {"keys": key, "values": value}.__getitem__,
        Setting(torch.full((1, HEADS), budget), SCALE, RECORDED["frequencies"], ()),
    )
    for first in range(0, TOKENS, 20) if policy.observe else ():
        block = slice(first, min(first + 20, TOKENS))
        held.query, held.is_real, held.step = (
            query[:, :, block],
            torch.ones(1, TOKENS).bool()[:, block],
            columns[block][-1],
        )
        visible = columns <= columns[block, None]
        feedback.observe(policy, held, entry_weights(held.query, key, visible[None, None], Softmax(SCALE)), False)
    return held


def priority(name: str, **arguments) -> torch.Tensor:
    return POLICIES[name].priority(after_prompt(name, **arguments))[0]


def test_h2o_is_observed_attention():
    # theirs is the mean over the queries that saw an entry and over the group, ours the sum
    seen = torch.arange(TOKENS, 0, -1)
    torch.testing.assert_close(priority("h2o") / seen / GROUP, RECORDED["h2o"])


def test_tova():
    # theirs is the mean over query heads, ours the mean over KV heads of sums; they keep the last token for good
    torch.testing.assert_close(priority("tova")[:, :-1] / GROUP, RECORDED["tova"][:, :-1])


def test_snapkv_window():
    # kvpress pools by the average and leaves the window's own tokens out; the paper pools by the maximum
    window = 32
    received = after_prompt("snapkv").state.mean(3)[..., :-window] / GROUP
    theirs = RECORDED["snapkv"][:, :-window]
    torch.testing.assert_close(F.avg_pool1d(received, 7, stride=1, padding=3)[0], theirs)
    assert torch.equal(after_prompt("morphkv").state, after_prompt("snapkv").state)


@pytest.mark.parametrize("name", ["keydiff", "expected_attention"])
def test_keydiff_and_expected_attention(name):
    first = 4 if name == "expected_attention" else 0  # its sinks
    torch.testing.assert_close(priority(name)[:, first:], RECORDED[name][:, first:], rtol=1e-4, atol=1e-6)


def test_key_norm():
    key = RECORDED["key"][None]
    new = NewTokens(torch.zeros(1, HEADS, TOKENS), key, key, torch.arange(TOKENS)[None], 0, 0)
    torch.testing.assert_close(POLICIES["key_norm"].score(new)[0], RECORDED["key_norm"])


def test_lagkv():
    # a budget of 32 has a lag of 8; the sinks and the last, unscored tokens have the highest score
    ours = priority("lagkv", budget=32)
    assert torch.equal(ours, RECORDED["lagkv"])
    assert len(ours.unique()) == 9


def test_adaptive_budgets():
    pruned = RECORDED["adaptive_pruned"]
    held = after_prompt("h2o")  # whose entries they are does not matter
    nobody, surplus, floor = torch.zeros(1, HEADS, TOKENS).bool(), pruned.sum().view(1, 1), torch.tensor(20 // 5)
    victims = feedback.victims(RECORDED["adaptive"][None], held, nobody, surplus, TOKENS, floor)
    assert torch.equal(victims[0], pruned)
    assert (TOKENS - pruned.sum(1)).tolist() == [36, 4]  # one head is down to what it is sure of


def test_pyramid_budgets():
    ours = [row[0] for row in pyramid_budgets(6, 1, 64, floor=1)]
    theirs = RECORDED["pyramid"].tolist()  # rounded one by one, ours so that the mean is exact
    assert all(abs(one - other) <= 1 for one, other in zip(ours, theirs, strict=True)), (ours, theirs)
