"""The form of a policy: the rule that decides which entry of a head goes first."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import torch

from retention_gates.gates.policies.held import Held


@dataclass(frozen=True)
class NewTokens:
    """T tokens that one layer has just computed, before any of them attends."""

    log_beta: torch.Tensor  # [B, H, T] fp32, of the gates; without meaning if they are untrained
    key: torch.Tensor  # [B, H, T, D], after RoPE
    value: torch.Tensor  # [B, H, T, Dv]
    offset: torch.Tensor  # [B, T] int64, position counted from the row's first real token
    seed: int | torch.Tensor  # or int64 [B], one for each row
    layer: int


def zeros(new: NewTokens) -> torch.Tensor:
    """A state of one 0 per token, [B, H, T, 1] fp32."""
    return new.key.new_zeros((*new.key.shape[:3], 1), dtype=torch.float32)


def first_of_state(held: Held) -> torch.Tensor:
    return held.state[..., 0]


@dataclass(frozen=True, kw_only=True)
class Policy:
    """The fields that all policies share. The entry of lowest priority goes first; of equals, the lowest position."""

    name: str
    needs_gates: bool = False  # trained ones, that is; without, log_beta is ignored
    keeps_sinks: bool = True  # whether the first tokens are protected unless the caller says otherwise
    recent_fraction: float = 0.0  # share of a head's budget that its youngest entries are sure of
    most_recent: int | None = None  # tokens, a limit to that share


@dataclass(frozen=True, kw_only=True)
class ScoredPolicy(Policy):
    """Known ahead: a score is set when a token is created, from that token alone.

    Nothing is recomputed, any length of chunk gives the same, and a whole sequence is simulated in one forward pass.
    """

    score: Callable[[NewTokens], torch.Tensor]  # -> [B, H, T] fp32
    linear_in_age: bool = False  # the priority is age * score rather than score
    is_log_beta: bool = False  # whether the score is the gate's output itself, and nothing is left to compute


@dataclass(frozen=True, kw_only=True)
class FeedbackPolicy(Policy):
    """Looks at what is held, and at the attention that it received, after every step.

    Each entry carries `state_size` numbers. `initial_state` gives them at its creation; `observe`, if there is one,
    gives them anew after a block of n consecutive queries has attended, from what each entry received of each query,
    the softmax weights summed over the query heads of its KV head: fp32 [B, H, n, S], 0 where a query did not see an
    entry. It may change `held.state` and `held.head_state` in place, and must give the same for queries that come in
    one block or in several.
    """

    observe: Callable[[Held, torch.Tensor], torch.Tensor] | None = None  # -> [B, H, S, K]
    # after which tokens `observe` changes anything: of their offsets int64 [B, T] from the row's first real token, and
    # budgets int64 [B, H]; None: after any
    is_due: Callable[[torch.Tensor, torch.Tensor], torch.Tensor] | None = None  # -> bool [B, T]
    looks_at_weights: bool = True  # if not, `observe` gets none, [B, H, 0, S]
    priority: Callable[[Held], torch.Tensor] = first_of_state  # -> [B, H, S] fp32
    initial_state: Callable[[NewTokens], torch.Tensor] = zeros  # -> [B, H, T, K] fp32
    state_size: int | Callable[[int], int] = 1  # K, or K of the head dim
    head_state_size: Callable[[int, int], int] = lambda head_dim, group: 0  # P, numbers per KV head
    interval: int = 1  # steps for which a priority holds; an entry without one stays
    # of the victims, bool [B, H, S], at most so many: keys [B, H, S, D] and values of the others with them merged in
    merge: Callable[[Held, torch.Tensor, int], tuple[torch.Tensor, torch.Tensor]] | None = None
    same_for_all_heads: bool = False  # all heads of a layer evict alike, so that they need equal budgets
    needs_rotation: bool = False  # of the model's RoPE
    reads_back: bool = False  # its functions ask the device for numbers, so that no graph can be captured of them
    needs_instruction: bool = False  # a pinned span

    @property
    def needs_attention(self) -> bool:
        return self.observe is not None and self.looks_at_weights

    def state_width(self, head_dim: int) -> int:
        return self.state_size if isinstance(self.state_size, int) else self.state_size(head_dim)


@cache
def as_feedback(policy: Policy) -> FeedbackPolicy:
    """The same policy as one that looks at what is held, for heads that share their budgets."""
    if isinstance(policy, FeedbackPolicy):
        return policy
    assert isinstance(policy, ScoredPolicy)
    score, linear_in_age = policy.score, policy.linear_in_age
    return FeedbackPolicy(
        name=policy.name,
        needs_gates=policy.needs_gates,
        keeps_sinks=policy.keeps_sinks,
        recent_fraction=policy.recent_fraction,
        most_recent=policy.most_recent,
        initial_state=lambda new: score(new)[..., None],
        priority=lambda held: held.age * held.state[..., 0] if linear_in_age else held.state[..., 0],
    )
