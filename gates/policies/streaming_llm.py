"""The sliding window that keeps its first tokens."""

import torch

from retention_gates.gates.policies.policy import Policy


def score(log_beta: torch.Tensor, key: torch.Tensor, offset: torch.Tensor, seed: int, layer: int) -> torch.Tensor:
    """The position: the oldest entry goes first. The protected tokens are the attention sinks.

    fp32 rounds positions above 2^24, but in order, and of equals the lowest position goes: still the oldest.

    Source: "Efficient Streaming Language Models with Attention Sinks", https://arxiv.org/abs/2309.17453
    """
    return offset[:, None].float().expand_as(log_beta)


STREAMING_LLM = Policy("streaming_llm", linear_in_age=False, needs_gates=False, recent_fraction=0.0, score=score)
