"""Victims are merged into the survivors that are most like them."""

import torch
import torch.nn.functional as F

from retention_gates.gates.policies.held import Held
from retention_gates.gates.policies.policy import FeedbackPolicy, NewTokens

SIMILAR = 0.6  # cosine of the keys from which on a victim is merged rather than dropped
VICTIMS = 128  # looked at together, each beside all entries


def observe(held: Held, weights: torch.Tensor) -> torch.Tensor:
    """All attention that an entry ever received, as in H2O, and how many tokens it stands for."""
    held.state[..., 0] += weights.sum(2)
    return held.state


def merge(held: Held, victims: torch.Tensor, most: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Each victim joins the survivor of nearest key; keys and values are means over the tokens an entry stands for.

    A victim whose key has a cosine below 0.6 to all survivors' is dropped. As in "EMS: Adaptive Evict-then-Merge
    Strategy for Head-wise KV Cache Compression", https://arxiv.org/abs/2412.08521, and "ZeroMerge: Parameter-Free KV
    Cache Compression", https://arxiv.org/abs/2503.10714, but: both merge into a part of the cache set aside for it,
    here any survivor will do; and an entry's logit is not raised by the log of the number of tokens it stands for.
    """
    count = held.state[..., 1:].clone()  # [B, H, S, 1]
    keys, values = held.keys.float(), held.values.float()
    units, survives = F.normalize(keys, dim=3), held.exists & ~victims
    mass, key_sum, value_sum = count.clone(), keys * count, values * count
    by_victim = victims.to(torch.uint8).argsort(dim=2, descending=True, stable=True)[:, :, :most]
    for first in range(0, most, VICTIMS):
        index = by_victim[:, :, first : first + VICTIMS]  # [B, H, V]
        similarity = _gather(units, index) @ units.transpose(2, 3)  # [B, H, V, S]
        nearest = similarity.masked_fill(~survives[:, :, None], -1.0).max(dim=3, keepdim=True)
        joins = victims.gather(2, index)[..., None] & (nearest.values >= SIMILAR)
        share = torch.zeros_like(similarity).scatter_(3, nearest.indices, _gather(count, index) * joins)
        mass += share.sum(2)[..., None]
        key_sum += share.transpose(2, 3) @ _gather(keys, index)
        value_sum += share.transpose(2, 3) @ _gather(values, index)
    held.state[..., 1:] = mass
    grown = mass > count  # others stay as they are, to the bit
    mass = mass.clamp(min=1.0)
    return (key_sum / mass).where(grown, keys), (value_sum / mass).where(grown, values)


def _gather(x: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    return x.gather(2, index[..., None].expand(-1, -1, -1, x.shape[3]))


def one_token(new: NewTokens) -> torch.Tensor:
    state = new.key.new_zeros((*new.key.shape[:3], 2), dtype=torch.float32)
    state[..., 1] = 1.0
    return state


MERGING = FeedbackPolicy(
    name="merging", recent_fraction=0.5, state_size=2, initial_state=one_token, observe=observe, merge=merge
)
