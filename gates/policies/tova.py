"""The entry that the last token attends to least goes."""

import torch

from retention_gates.gates.policies.held import Held
from retention_gates.gates.policies.policy import FeedbackPolicy


def observe(held: Held, weights: torch.Tensor) -> torch.Tensor:
    """The last query's attention, averaged over all heads of the layer, which hold the same tokens.

    Source: "Transformers are Multi-State RNNs", https://arxiv.org/abs/2401.06104
    """
    last = held.is_real.long().cumsum(1).argmax(1)  # [B], the first of equals: the last real query
    index = last[:, None, None, None].expand(-1, weights.shape[1], 1, weights.shape[3])
    received = weights.gather(2, index).mean(1).squeeze(1)  # [B, S]
    return received[:, None, :, None].expand(-1, weights.shape[1], -1, -1)


TOVA = FeedbackPolicy(name="tova", same_for_all_heads=True, observe=observe)
