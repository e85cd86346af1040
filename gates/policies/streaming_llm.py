"""The sliding window that keeps its first tokens."""

import torch

from retention_gates.gates.policies.policy import NewTokens, ScoredPolicy


def score(new: NewTokens) -> torch.Tensor:
    """The position: the oldest entry goes first. The protected tokens are the attention sinks.

    fp32 rounds positions above 2^24, but in order, and of equals the lowest position goes: still the oldest.

    Source: "Efficient Streaming Language Models with Attention Sinks", https://arxiv.org/abs/2309.17453
    """
    return new.offset[:, None].float().expand_as(new.log_beta)


STREAMING_LLM = ScoredPolicy(name="streaming_llm", score=score)
