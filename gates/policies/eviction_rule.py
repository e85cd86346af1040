"""The rule by which one layer of a cache keeps entries: the policy, with everything that a run chooses."""

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property

import torch

from retention_gates.gates.policies import FeedbackPolicy, NewTokens, Policy, Setting

SURE_SHARE = 0.2  # of its budget that a head keeps when the heads share them, alpha in AdaKV, arXiv 2407.11550
# ages become fp32 when they are multiplied with scores, which holds every whole number up to here
MOST_TOKENS = 2**24
MOST_SEED = 2**32 - 1
MOST_SPANS = 256  # protected ones that do not touch
Reserve = tuple[int, int, int]  # start, stop, and the entries of the span that each head keeps at least
Span = tuple[int, int]  # offsets start <= offset < stop, counted from a row's first real token


@dataclass(frozen=True)
class EvictionRule:
    """Decides for one layer which entries may go and in which order.

    Offsets count from a row's first real token, so that left padding changes nothing.
    """

    policy: Policy
    budgets: tuple[int, ...]  # [H] entries per KV head
    buffer_size: int  # entries above its budget that a head may hold before it evicts
    protected: tuple[Span, ...]  # never evicted, counted inside the budget
    seed: int
    layer: int
    frequencies: tuple[float, ...] = ()  # of the model's rotary embedding, for policies that need it
    is_shared: bool = False  # whether the heads of the layer move their budgets between them as they go
    reserved: tuple[Reserve, ...] = ()  # needs a policy that looks at what is held
    is_pooled: bool = False  # whether the heads of all layers move their budgets between them

    def __post_init__(self) -> None:
        assert min(self.budgets) > self.kept_count, "a head must be able to hold a token beside those that it must"
        assert not self.reserved or isinstance(self.policy, FeedbackPolicy)

    @property
    def protected_count(self) -> int:
        return count_offsets(self.protected)

    @property
    def kept_count(self) -> int:
        """Entries that a head cannot do without: the protected ones, and what is reserved."""
        return self.protected_count + count_reserved(self.reserved)

    @property
    def sizes(self) -> tuple[int, ...]:
        """Entries that each head needs room for while a step lasts."""
        most = self.budgets
        if self.is_shared:
            others = (len(most) - 1) * int(SURE_SHARE * min(most))
            most = (sum(most) - others,) * len(most)
        return tuple(entries + self.buffer_size for entries in most)

    @property
    def most_victims(self) -> int:
        """Entries that one head may lose at one step."""
        return self.buffer_size * (len(self.budgets) if self.is_shared else 1)

    @property
    def floor(self) -> int | None:
        """Entries that each head is sure of if the heads share their budgets."""
        return max(int(SURE_SHARE * min(self.budgets)), self.kept_count + 1) if self.is_shared else None

    def recent(self, device: torch.device) -> torch.Tensor | None:
        """The youngest entries that each head is sure of, int64 [H]; None if the policy promises none.

        A share of the budget, as far as the policy's limit and the entries that must stay leave room.
        """
        if not self.policy.recent_fraction:
            return None
        wanted = [int(self.policy.recent_fraction * budget) for budget in self.budgets]
        if self.policy.most_recent is not None:
            wanted = [min(entries, self.policy.most_recent) for entries in wanted]
        room = [budget - self.kept_count for budget in self.budgets]
        return torch.tensor([min(pair) for pair in zip(wanted, room, strict=True)], device=device)

    @cached_property
    def interval(self) -> int:
        """Steps for which a feedback policy's priorities hold.

        What entered since then has none and stays, so that every head must be sure of as many recent entries.
        """
        interval = self.policy.interval if isinstance(self.policy, FeedbackPolicy) else 1
        recent = self.recent(torch.device("cpu"))
        return interval if recent is not None and int(recent.min()) >= interval else 1

    @property
    def instruction(self) -> tuple[Span, ...]:
        """Spans that the caller pinned beside the first tokens."""
        return self.protected[1:]

    def setting(self, rows: int, scale: float, device: torch.device) -> Setting:
        """For a policy that looks at `rows` rows under this rule."""
        budgets = torch.tensor(self.budgets, device=device).expand(rows, -1)
        return Setting(budgets, scale, torch.tensor(self.frequencies, device=device), self.instruction)

    def is_protected(self, offset: torch.Tensor) -> torch.Tensor:
        """Whether the tokens at these offsets are never evicted, bool of the same shape."""
        result = torch.zeros_like(offset, dtype=torch.bool)
        for start, stop in self.protected:
            result |= (offset >= start) & (offset < stop)
        return result

    def new_tokens(
        self, log_beta: torch.Tensor, key: torch.Tensor, value: torch.Tensor, offset: torch.Tensor
    ) -> NewTokens:
        """Gives the policy its view of log_beta [B, H, T], key and value [B, H, T, D] and offset [B, T]."""
        return NewTokens(log_beta, key, value, offset, self.seed, self.layer)


def count_reserved(reserved: tuple[Reserve, ...]) -> int:
    """Entries that are reserved in each head, spans that overlap counted twice."""
    return sum(min(entries, stop - start) for start, stop, entries in reserved)


def merged_spans(spans: Iterable[Span]) -> list[Span]:
    """Returns the spans in order, those that overlap or touch made one."""
    merged: list[Span] = []
    for start, stop in sorted(spans):
        if merged and start <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(stop, merged[-1][1]))
        else:
            merged.append((start, stop))
    return merged


def count_offsets(spans: tuple[Span, ...]) -> int:
    """Offsets that lie in at least one span."""
    count, reached = 0, 0
    for start, stop in sorted(spans):
        count += max(0, stop - max(start, reached))
        reached = max(reached, stop)
    return count
