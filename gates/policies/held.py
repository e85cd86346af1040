"""The entries of a layer's KV heads, as a policy sees them."""

from collections.abc import Callable
from functools import cached_property
from typing import NamedTuple

import torch


class Setting(NamedTuple):
    """Settings that stay the same from step to step."""

    budgets: torch.Tensor  # int64 [B, H], entries per KV head
    scale: float  # what q k is multiplied with
    frequencies: torch.Tensor  # fp32 [D / 2], radians per position of the model's rotary embedding; empty if unknown
    instruction: tuple[tuple[int, int], ...]  # what the caller pinned, offsets start <= offset < stop


class Held:
    """The entries of every KV head after a block of n queries has attended: S places each, some of them empty.

    Attributes:
        positions: int64 [B, H, S], an entry's column in its sequence, -1 for an empty place. In no order.
        state: fp32 [B, H, S, K], the policy's own.
        head_state: fp32 [B, H, P], the policy's own, per KV head.
        query: [B, HQ, n, D], the block's queries after RoPE.
        is_real: bool [B, n], False for a query of padding, which counts for nothing.
        step: int64 [], the column of the block's last query.
        start: int64 [B], the column of each row's first real token.
        budgets, scale, frequencies, instruction: see `Setting`.
    """

    def __init__(
        self,
        positions: torch.Tensor,
        state: torch.Tensor,
        head_state: torch.Tensor,
        query: torch.Tensor,
        is_real: torch.Tensor,
        step: torch.Tensor,
        start: torch.Tensor,
        read: Callable[[str], torch.Tensor],
        setting: Setting,
    ):
        self.positions, self.state, self.head_state, self.query = positions, state, head_state, query
        self.is_real, self.step, self.start = is_real, step, start
        self._read = read
        self.budgets, self.scale, self.frequencies, self.instruction = setting

    @cached_property
    def keys(self) -> torch.Tensor:
        """[B, H, S, D], after RoPE."""
        return self._read("keys")

    @cached_property
    def values(self) -> torch.Tensor:
        """[B, H, S, Dv]."""
        return self._read("values")

    @property
    def exists(self) -> torch.Tensor:
        """True where a place holds an entry, bool [B, H, S]."""
        return self.positions >= 0

    @property
    def age(self) -> torch.Tensor:
        """Steps since each entry was created, int64 [B, H, S]; without meaning for empty places."""
        return self.step - self.positions

    @property
    def group(self) -> int:
        """Query heads per KV head."""
        return self.query.shape[1] // self.positions.shape[1]

    @property
    def query_steps(self) -> torch.Tensor:
        """The column of each of the block's queries, int64 [n]."""
        tokens = self.query.shape[2]
        return self.step - tokens + 1 + torch.arange(tokens, device=self.step.device)

    def is_instruction(self, offsets: torch.Tensor) -> torch.Tensor:
        """Whether tokens at these offsets from the row's first real token belong to the instruction."""
        inside = torch.zeros_like(offsets, dtype=torch.bool)
        for start, stop in self.instruction:
            inside |= (offsets >= start) & (offsets < stop)
        return inside

    def along_positions(self, change: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor) -> torch.Tensor:
        """Applies `change` to x [B, H, S] with the entries in order of position, the empty places first."""
        order = self.positions.argsort(dim=2)
        changed = change(x.masked_fill(~self.exists, 0.0).gather(2, order))
        return torch.empty_like(changed).scatter_(2, order, changed)


def rotate(x: torch.Tensor, positions: torch.Tensor, frequencies: torch.Tensor) -> torch.Tensor:
    """x [..., T, D] rotated by the rotary embedding of positions [..., T]; negative ones rotate back."""
    angles = positions[..., None] * frequencies  # [..., T, D / 2]
    cos, sin = angles.cos(), angles.sin()
    first, second = x.chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)
