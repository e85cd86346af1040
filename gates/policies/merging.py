"""Victims are merged into the survivors that are most like them."""

import torch
import torch.nn.functional as F

from retention_gates.gates.policies.held import Held
from retention_gates.gates.policies.policy import FeedbackPolicy, NewTokens

SIMILAR = 0.6  # cosine of the keys from which on a victim is merged rather than dropped
VICTIMS = 128  # looked at together, each beside all entries
EPSILON = 1e-12  # F.normalize's least length


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
    keys, values, count = held.keys.float(), held.values.float(), held.state[..., 1:]  # count is [B, H, S, 1]
    lengths, survives = keys.norm(dim=3).clamp(min=EPSILON)[:, :, None], held.exists & ~victims
    by_victim = victims.to(torch.uint8).argsort(dim=2, descending=True, stable=True)[:, :, :most]
    joined = []
    for index in by_victim.split(VICTIMS, dim=2):  # [B, H, V]
        similarity = F.normalize(_gather(keys, index), dim=3) @ keys.transpose(2, 3) / lengths  # [B, H, V, S]
        nearest = similarity.masked_fill(~survives[:, :, None], -1.0).max(dim=3)
        joined.append((index, nearest.indices, victims.gather(2, index) & (nearest.values >= SIMILAR)))
    for index, target, joins in joined:
        # [B, H, V, V], what joins the same survivor: every victim of it knows, and writes, the same result
        together = ((target[..., None] == target[:, :, None]) & joins[:, :, None]).float()
        own, before = _gather(count, index), _gather(count, target)
        added = together @ own
        for x in (keys, values):
            mean = (_gather(x, target) * before + together @ (_gather(x, index) * own)) / (before + added)
            _put(x, target, mean, where=added > 0)
        _put(count, target, before + added, where=added > 0)
    return keys, values


def _gather(x: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    return x.gather(2, index[..., None].expand(-1, -1, -1, x.shape[3]))


def _put(x: torch.Tensor, index: torch.Tensor, new: torch.Tensor, *, where: torch.Tensor) -> None:
    """Others stay as they are, to the bit."""
    places = index[..., None].expand(-1, -1, -1, x.shape[3])
    x.scatter_(2, places, new.where(where, x.gather(2, places)))


def one_token(new: NewTokens) -> torch.Tensor:
    state = new.key.new_zeros((*new.key.shape[:3], 2), dtype=torch.float32)
    state[..., 1] = 1.0
    return state


MERGING = FeedbackPolicy(
    name="merging", recent_fraction=0.5, state_size=2, initial_state=one_token, observe=observe, merge=merge
)
