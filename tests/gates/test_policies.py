"""Scores are what the papers say, and do not depend on how the tokens arrive."""

import pytest
import torch

from retention_gates.gates.policies import POLICIES, find_policy


def inputs(batch=2, heads=3, tokens=40, seed=0):
    torch.manual_seed(seed)
    log_beta = -torch.rand(batch, heads, tokens)
    return log_beta, torch.randn(batch, heads, tokens, 8), torch.arange(tokens).expand(batch, -1)


@pytest.mark.parametrize("name", POLICIES)
def test_tokens_may_arrive_in_any_chunks_and_rows(name):
    log_beta, key, offset = inputs()
    policy = find_policy(name)
    whole = policy.score(log_beta, key, offset, 3, 1)
    assert whole.shape == (2, 3, 40) and whole.dtype == torch.float32 and whole.isfinite().all()
    for rows in (slice(0, 1), slice(1, 2)):
        parts = [
            policy.score(log_beta[rows, :, part], key[rows, :, part], offset[rows, part], 3, 1)
            for part in (slice(0, 1), slice(1, 17), slice(17, 40))
        ]
        assert torch.equal(torch.cat(parts, dim=2), whole[rows])


def test_retention_scores_by_log_beta():
    log_beta, key, offset = inputs()
    assert find_policy("retention").linear_in_age
    assert torch.equal(find_policy("retention").score(log_beta, key, offset, 0, 0), log_beta)


def test_streaming_llm_lets_the_oldest_go():
    log_beta, key, offset = inputs()
    score = find_policy("streaming_llm").score(log_beta, key, offset, 0, 0)
    assert (score.diff(dim=2) > 0).all() and not find_policy("streaming_llm").linear_in_age


def test_key_norm_lets_the_largest_go():
    log_beta, key, offset = inputs()
    key[0, 1, 7] = 100.0
    score = find_policy("key_norm").score(log_beta, key.bfloat16(), offset, 0, 0)
    assert score[0, 1].argmin() == 7
    torch.testing.assert_close(score, -key.bfloat16().float().square().sum(-1).sqrt())


def test_random_is_uniform_and_differs_by_seed_layer_head_and_offset():
    tokens = 4000
    nothing, key, offset = torch.zeros(1, 2, tokens), torch.zeros(1, 2, tokens, 1), torch.arange(tokens)[None]
    draws = [
        find_policy("random").score(nothing, key, offset, seed, layer)[0, head]
        for seed in (0, 1, 2**32 - 1)
        for layer in (0, 1)
        for head in (0, 1)
    ]
    for i, draw in enumerate(draws):
        assert 0 <= draw.min() and draw.max() < 1
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
