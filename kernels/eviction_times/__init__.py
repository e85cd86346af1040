"""When a bounded cache would evict each token. See README.md in this folder."""

import torch

from retention_gates.kernels.checks import check_same_device, check_shape
from retention_gates.kernels.dispatch import use_fused
from retention_gates.kernels.eviction_times import naive

LARGEST_SCORE = 1e30  # times an age of up to 2^24 it is still finite in fp32


@torch.no_grad()
def eviction_times(
    score: torch.Tensor,
    budgets: torch.Tensor,
    *,
    linear_in_age: bool,
    buffer_size: int = 1,
    protected: torch.Tensor | None = None,
    recent: torch.Tensor | None = None,
    valid: torch.Tensor | None = None,
) -> torch.Tensor:
    """First step at which each token is no longer seen, int64 [B, H, T]: query t sees entry j iff j <= t < time.

    At step t token t enters and everything held is attended to. Then a head that holds budget + buffer_size entries
    evicts the buffer_size lowest by (t - j) * score (the fp32 product) or by score; among equals the lowest position.
    A token that is never evicted has time T, one that never enters 0.

    Args:
        score: fp32 [B, H, T], finite.
        budgets: int64 [H], entries that a head keeps, at least 1.
        linear_in_age: whether the score counts per step of age (retention: score = log_beta) or once.
        buffer_size: entries above the budget that call for an eviction.
        protected: bool [B, T], tokens that are never evicted; they count.
        recent: int64 [H], the age below which a token is never evicted.
        valid: bool [B, T], False for padding, which never enters. None: all enter.

    Raises:
        ValueError: for shapes, dtypes or devices that don't go together, and where protected and recent tokens leave
            nothing to evict.
    """
    if score.ndim != 3 or score.shape[-1] == 0 or score.dtype != torch.float32:
        raise ValueError(f"score must be torch.float32 [B, H, T] with T >= 1, not {score.dtype} {list(score.shape)}.")
    batch, heads, tokens = score.shape
    check_shape("budgets", budgets, (heads,), "[H]")
    if budgets.dtype != torch.int64:
        raise ValueError(f"budgets must be torch.int64, not {budgets.dtype}: convert them with .long().")
    if buffer_size < 1:
        raise ValueError(f"buffer_size must be at least 1 entry, not {buffer_size}.")
    for name, flags in (("protected", protected), ("valid", valid)):
        if flags is not None:
            check_shape(name, flags, (batch, tokens), "[B, T]")
            if flags.dtype != torch.bool:
                raise ValueError(f"{name} must be torch.bool, not {flags.dtype}: convert it with .bool().")
    if recent is not None:
        check_shape("recent", recent, (heads,), "[H]")
        if recent.dtype != torch.int64:
            raise ValueError(f"recent must be torch.int64, not {recent.dtype}: convert it with .long().")
    check_same_device("score", score, budgets=budgets, protected=protected, recent=recent, valid=valid)
    largest_budget = _check_values(score, budgets, linear_in_age, protected, recent, valid)
    form = naive.eviction_times
    if use_fused("eviction_times", score):
        from retention_gates.kernels.eviction_times.fused import eviction_times as form
    return form(
        score,
        budgets,
        linear_in_age=linear_in_age,
        largest_budget=largest_budget,
        buffer_size=buffer_size,
        protected=protected,
        recent=recent,
        valid=valid,
    )


def _check_values(
    score: torch.Tensor,
    budgets: torch.Tensor,
    linear_in_age: bool,
    protected: torch.Tensor | None,
    recent: torch.Tensor | None,
    valid: torch.Tensor | None,
) -> int:
    """The largest budget. One read from the device, unless it has to say what is wrong."""
    largest = LARGEST_SCORE if linear_in_age else torch.finfo(torch.float32).max
    protected_count = budgets.new_zeros(())
    if protected is not None:
        protected_count = (protected if valid is None else protected & valid).sum(1).amax()
    kept = protected_count + (torch.zeros_like(budgets) if recent is None else recent)
    facts = (~(score.abs() <= largest)).any(), (kept > budgets).any(), budgets.amin(), budgets.amax(), protected_count
    bad_score, no_room, smallest_budget, largest_budget, count = torch.stack([x.long() for x in facts]).tolist()
    if bad_score:
        raise ValueError(f"score must lie between -{largest:.0e} and {largest:.0e} and not be NaN: look at the gates.")
    if smallest_budget < 1:
        raise ValueError(f"budgets must be of at least 1 entry each, not {budgets.tolist()}.")
    if no_room:
        raise ValueError(
            f"{count} protected tokens and recent={(kept - count).tolist()} exceed the budgets {budgets.tolist()}: "
            "protect fewer tokens or raise the budgets."
        )
    return largest_budget
