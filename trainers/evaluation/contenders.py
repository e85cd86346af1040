"""The memories of bounded size that are scored, and their names in records."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from retention_gates.gates.cache.budgets import BUDGETS, Budgets
from retention_gates.gates.policies import FeedbackPolicy, Policy, ScoredPolicy, find_policy

FULL_CACHE = "full"
MEASURED = "measured"  # budgets that a policy keeps most attention with, see kept_mass.py


@dataclass(frozen=True)
class Contender:
    """One memory to be scored: who is evicted, how much is kept, and how it is divided.

    Args:
        pin: pin the spans that an example asks for, such as its system prompt; records call the policy "NAME+pin".
        entries: of every gated layer and KV head, if budgets are "measured" and have been.
    """

    policy: str | Policy  # its name, or itself
    memory_size: int  # mean entries per KV head
    budgets: str = "uniform"
    pin: bool = False
    entries: tuple[tuple[int, ...], ...] | None = None

    def __post_init__(self) -> None:
        policy = find_policy(self.policy)
        if self.budgets not in (*BUDGETS, MEASURED):
            allowed = ", ".join(map(repr, (*BUDGETS, MEASURED)))
            raise ValueError(f"budgets={self.budgets!r} is unknown: choose among {allowed}.")
        if isinstance(policy, FeedbackPolicy) and policy.needs_instruction:
            raise ValueError(
                f"Policy {policy.name!r} needs an instruction, and contenders get texts and prompts without one: "
                "leave it out, or try it with BoundedCache and pin."
            )
        if self.budgets == "adaptive" and isinstance(policy, FeedbackPolicy) and policy.same_for_all_heads:
            raise ValueError(
                f"Policy {policy.name!r} evicts the same tokens in all heads of a layer, which cannot have adaptive "
                "budgets: give it uniform ones."
            )
        if self.budgets == "calibrated" and not policy.needs_gates:
            raise ValueError(
                f"Calibrated budgets follow what the gates retain, which policy {policy.name!r} does not look at: "
                "give it uniform budgets, or measured ones."
            )

    @property
    def division(self) -> str | Budgets:
        """The budgets as a cache takes them.

        Raises:
            ValueError: for measured ones that have not been measured.
        """
        if self.budgets != MEASURED:
            return self.budgets
        if self.entries is None:
            raise ValueError(f"Measured budgets of {self.policy!r} have no numbers: see with_measured_budgets.")
        return [list(layer) for layer in self.entries]


def contenders(policies: Sequence[str], memory_sizes: Sequence[int], budgets: Sequence[str]) -> list[Contender]:
    """All combinations that have a meaning: calibrated budgets go to policies of trained gates only, adaptive ones not
    to a policy that evicts alike in all heads.

    Raises:
        ValueError: for an unknown or repeated name, and for a policy that is left without any budgets.
    """
    for name, values in (("policies", policies), ("memory sizes", memory_sizes), ("budgets", budgets)):
        if len(set(values)) != len(values):
            raise ValueError(f"The {name} {list(values)} name one twice: name each once.")
    chosen = []
    for policy in policies:
        fitting = [b for b in budgets if _fits(find_policy(policy), b)]
        if not fitting:
            raise ValueError(
                f"Policy {policy!r} has no use for budgets {list(budgets)}: add 'uniform', or leave it out."
            )
        chosen += [Contender(policy, size, division) for division in fitting for size in memory_sizes]
    if not chosen:
        raise ValueError("Nothing to compare: name at least one policy, one memory size and one kind of budgets.")
    return chosen


def _fits(policy: Policy, budgets: str) -> bool:
    if budgets == "calibrated":
        return policy.needs_gates
    if budgets == "global":
        return isinstance(policy, ScoredPolicy)
    return budgets != "adaptive" or not (isinstance(policy, FeedbackPolicy) and policy.same_for_all_heads)


def name_of(contender: Contender | None) -> dict[str, Any]:
    """Gives the fields that name a contender in a record; None is the full cache."""
    if contender is None:
        return {"policy": FULL_CACHE, "memory_size": None, "budgets": None}
    name = find_policy(contender.policy).name + ("+pin" if contender.pin else "")
    return {"policy": name, "memory_size": contender.memory_size, "budgets": contender.budgets}
