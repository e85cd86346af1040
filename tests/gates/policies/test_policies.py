"""Scores are what the papers say, and do not depend on how the tokens arrive."""

from dataclasses import replace

import pytest
import torch
from layer_calls import attend
from plain_feedback import simulate
from torch import nn

from retention_gates.gates.cache.feedback_layer import FeedbackSlotLayer
from retention_gates.gates.policies import POLICIES, FeedbackPolicy, NewTokens, ScoredPolicy, as_feedback, find_policy
from retention_gates.gates.policies.eviction_rule import EvictionRule
from retention_gates.gates.policies.held import Held, Setting

SCORED = [name for name, policy in POLICIES.items() if isinstance(policy, ScoredPolicy)]
OWNER = nn.Identity()
FED_BACK = [name for name, policy in POLICIES.items() if isinstance(policy, FeedbackPolicy)]


def new_tokens(batch=2, heads=3, tokens=40, seed=0):
    torch.manual_seed(seed)
    log_beta = -torch.rand(batch, heads, tokens)
    key, value = torch.randn(2, batch, heads, tokens, 8)
    return NewTokens(log_beta, key, value, torch.arange(tokens).expand(batch, -1), seed=3, layer=1)


def part_of(new, rows, columns):
    return replace(
        new,
        log_beta=new.log_beta[rows, :, columns],
        key=new.key[rows, :, columns],
        value=new.value[rows, :, columns],
        offset=new.offset[rows, columns],
    )


@pytest.mark.parametrize("name", SCORED)
def test_tokens_may_arrive_in_any_chunks_and_rows(name):
    new, policy = new_tokens(), find_policy(name)
    whole = policy.score(new)
    assert whole.shape == (2, 3, 40) and whole.dtype == torch.float32 and whole.isfinite().all()
    for rows in (slice(0, 1), slice(1, 2)):
        parts = [policy.score(part_of(new, rows, part)) for part in (slice(0, 1), slice(1, 17), slice(17, 40))]
        assert torch.equal(torch.cat(parts, dim=2), whole[rows])


def test_retention_scores_by_log_beta():
    new = new_tokens()
    assert find_policy("retention").linear_in_age
    assert torch.equal(find_policy("retention").score(new), new.log_beta)


@pytest.mark.parametrize(("name", "sinks"), [("streaming_llm", True), ("sliding_window", False)])
def test_windows_let_the_oldest_go(name, sinks):
    policy = find_policy(name)
    assert (policy.score(new_tokens()).diff(dim=2) > 0).all() and not policy.linear_in_age
    assert policy.keeps_sinks == sinks


def test_key_norm_lets_the_largest_go():
    new = new_tokens()
    new.key[0, 1, 7] = 100.0
    score = find_policy("key_norm").score(replace(new, key=new.key.bfloat16()))
    assert score[0, 1].argmin() == 7
    torch.testing.assert_close(score, -new.key.bfloat16().float().square().sum(-1).sqrt())


def test_value_norm_lets_the_smallest_go():
    new = new_tokens()
    new.value[0, 1, 7] = 0.0
    score = find_policy("value_norm").score(new)
    assert score[0, 1].argmin() == 7
    torch.testing.assert_close(score, new.value.square().sum(-1).sqrt())


def test_random_is_uniform_and_differs_by_seed_layer_head_and_offset():
    tokens = 4000
    nothing, key, offset = torch.zeros(1, 2, tokens), torch.zeros(1, 2, tokens, 1), torch.arange(tokens)[None]
    draws = [
        find_policy("random").score(NewTokens(nothing, key, key, offset, seed, layer))[0, head]
        for seed in (0, 1, 2**32 - 1)
        for layer in (0, 1)
        for head in (0, 1)
    ]
    for i, draw in enumerate(draws):
        assert draw.min() >= 0 and draw.max() < 1
        # standard errors of 4,000 draws: 0.0046 for the mean, 0.016 for a correlation
        assert abs(draw.mean() - 0.5) < 0.025
        assert abs(torch.corrcoef(torch.stack([draw[1:], draw[:-1]]))[0, 1]) < 0.08
        for other in draws[:i]:
            assert abs(torch.corrcoef(torch.stack([draw, other]))[0, 1]) < 0.08


def test_unknown_policy_names_the_nearest():
    with pytest.raises(ValueError, match="Did you mean 'streaming_llm'"):
        find_policy("streamingllm")
    with pytest.raises(ValueError, match="choose among 'retention'"):
        find_policy("h2o-with-everything")


FREQUENCIES = (1.0, 0.1)


def layer_run(name, budget, chunks, seed, heads=2, group=2, head_dim=4, shared=False, reserved=()):
    """What a layer holds after each chunk, by the cache and by plain Python."""
    protected = [(0, 2), (4, 7)] if name == "citrus" else [(0, 2)]
    tokens = sum(chunks)
    generator = torch.Generator().manual_seed(seed)
    key, value = torch.randn(2, 1, heads, tokens, head_dim, generator=generator)
    query = 2 * torch.randn(1, heads * group, tokens, head_dim, generator=generator)
    policy = as_feedback(POLICIES[name])
    rule = EvictionRule(policy, (budget,) * heads, 1, tuple(protected), 0, 0, FREQUENCIES, shared, reserved)
    layer, ours, first = FeedbackSlotLayer(rule, OWNER), [], 0
    for length in chunks:
        now = slice(first, first + length)
        attend(layer, OWNER, torch.zeros(1, heads, length), *(x[:, :, now] for x in (query, key, value)))
        ours.append([{p for p in layer.positions(head)[0].tolist() if p >= 0} for head in range(heads)])
        first += length
    arguments = (query[0].tolist(), key[0].tolist(), value[0].tolist(), budget, protected, 0.5, list(FREQUENCIES))
    plain = simulate(name, *arguments, chunks, shared, reserved)
    return ours, plain


@pytest.mark.parametrize("name", FED_BACK)
@pytest.mark.parametrize(
    "chunks", [[1] * 90, [50, 1, 1, 1, 40, 1, 1], [140] + [1] * 5], ids=["steps", "mixed", "prompt"]
)
def test_keeps_what_plain_python_keeps(name, chunks):
    # 140 tokens are more than one block of queries, 90 more than the windows of 32
    ours, plain = layer_run(name, budget=20, chunks=chunks, seed=1)
    assert ours == plain
    assert any(held != ours[-1][0] for held in ours[-1][1:]) or POLICIES[name].same_for_all_heads
    assert ours[-1][0] != set(range(sum(chunks) - 20, sum(chunks)))


@pytest.mark.parametrize("name", ["value_norm", "h2o", "snapkv", "merging"])
@pytest.mark.parametrize("chunks", [[1] * 60, [70, 1, 1, 1, 30, 1]], ids=["steps", "mixed"])
def test_heads_that_share_their_budgets(name, chunks):
    ours, plain = layer_run(name, budget=20, chunks=chunks, seed=2, heads=3, shared=True)
    assert ours == plain
    for step in ours[-10:]:
        assert sum(map(len, step)) == min(60, 3 * sum(chunks))
    sizes = {size for step in ours[-3:] for size in map(len, step)}
    assert min(sizes) >= 4
    if name == "value_norm" or len(chunks) < 10:  # one at a time, it may be each head's own entry that goes
        assert len(sizes) > 1


@pytest.mark.parametrize("name", ["value_norm", "h2o", "tova", "rkv"])
@pytest.mark.parametrize("chunks", [[1] * 60, [40, 1, 1, 1, 30, 1]], ids=["steps", "mixed"])
def test_spans_with_a_budget_of_their_own(name, chunks):
    reserved = ((5, 12, 3), (20, 30, 4))
    ours, plain = layer_run(name, budget=20, chunks=chunks, seed=2, reserved=reserved)
    assert ours == plain
    without, _ = layer_run(name, budget=20, chunks=chunks, seed=2)
    kept = [[[len(held & set(range(a, b))) for a, b, _ in reserved] for held in run[-1]] for run in (ours, without)]
    assert all(first >= 3 and second >= 4 for first, second in kept[0])
    assert any(first < 3 or second < 4 for first, second in kept[1])


def test_victims_that_are_merged_together():
    """Against loops: some join the same survivor, some are like none, and what nobody joins stays to the bit."""
    torch.manual_seed(0)
    places, most = 12, 6
    key, value = torch.randn(2, 1, 2, places, 8)
    key[:, :, 6:9] = key[:, :, :1] * torch.tensor([2.0, 3.0, 0.5])[:, None]  # these join the first
    key[:, :, 9] = key[:, :, 1] + 0.1
    count = torch.randint(1, 5, (1, 2, places)).float()
    victims = torch.zeros(1, 2, places, dtype=torch.bool)
    victims[:, 0, 6:], victims[:, 1, 7:10] = True, True
    positions = torch.arange(places).expand(1, 2, -1).clone()
    positions[:, 1, 11] = -1
    state = torch.stack([torch.rand(1, 2, places), count], dim=3)
    slots = {"keys": key.clone(), "values": value.clone()}
    setting = Setting(torch.full((1, 2), places), 1.0, torch.empty(0), ())
    query, real = torch.randn(1, 4, 1, 8), torch.ones(1, 1, dtype=torch.bool)
    held = Held(
        positions, state, torch.empty(1, 2, 0), query, real, torch.tensor(12), torch.tensor([0]), slots.get, setting
    )
    keys, values = POLICIES["merging"].merge(held, victims, most)
    for head in range(2):
        survivors = [i for i in range(places) if positions[0, head, i] >= 0 and not victims[0, head, i]]
        joined: dict[int, list[int]] = {i: [] for i in survivors}
        for victim in victims[0, head].nonzero().flatten().tolist():
            likeness = torch.cosine_similarity(key[0, head, victim][None], key[0, head, survivors])
            if likeness.max() >= 0.6:
                joined[survivors[int(likeness.argmax())]].append(victim)
        assert max(map(len, joined.values())) == (3 if head == 0 else 2)
        for survivor, others in joined.items():
            group = [survivor, *others]
            mass = count[0, head, group]
            assert held.state[0, head, survivor, 1] == mass.sum()
            for new, old in ((keys, key), (values, value)):
                mean = (old[0, head, group] * mass[:, None]).sum(0) / mass.sum()
                torch.testing.assert_close(new[0, head, survivor], mean)
                assert others or torch.equal(new[0, head, survivor], old[0, head, survivor])


def test_vase_keeps_large_values_and_draws_the_others_in_proportion_to_their_attention():
    heads, weights = 20_000, torch.tensor([0.01, 0.02, 0.9, 0.01, 0.06, 0.3])
    tokens, policy = len(weights), POLICIES["vase"]
    new = NewTokens(
        log_beta=torch.zeros(1, heads, tokens),
        key=torch.zeros(1, heads, tokens, 2),
        value=torch.zeros(1, heads, tokens, 2),
        offset=torch.arange(10, 10 + tokens)[None],
        seed=5,
        layer=2,
    )
    new.value[:, :, 3, 1] = 9.0
    state = policy.initial_state(new)
    state[..., 0] = 64 * weights  # all that the last 64 queries gave
    drawn = []
    for step in (200, 201):
        setting = Setting(torch.full((1, heads), 4), 1.0, torch.empty(0), ())
        held = Held(
            new.offset[:, None].expand(-1, heads, -1), state, torch.empty(1, heads, 0), torch.zeros(1, heads, 1, 2),
            torch.ones(1, 1, dtype=torch.bool), torch.tensor(step), torch.zeros(1, dtype=torch.int64),
            {"values": new.value}.__getitem__, setting,
        )  # fmt: skip
        priority = policy.priority(held)[0]
        assert (priority[:, 3] == float("inf")).all() and priority[:, [0, 1, 2, 4, 5]].isfinite().all()
        drawn.append(priority.masked_fill(priority.isinf(), float("-inf")).argmax(1))
    padded = torch.nn.functional.pad(weights, (2, 2))
    pooled = torch.stack([padded[i : i + 5].mean() for i in range(tokens)])
    pooled[3] = 0
    shares = torch.stack([(drawn[0] == i).float().mean() for i in range(tokens)])
    assert (shares - pooled / pooled.sum()).abs().max() < 0.014  # four standard errors of 20,000 draws
    assert 0.15 < (drawn[0] == drawn[1]).float().mean() < 0.35  # another step is another draw
