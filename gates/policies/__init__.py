"""Who is evicted: the trained gates, and the untrained rivals that they are measured against."""

import difflib

from retention_gates.gates.policies.key_norm import KEY_NORM
from retention_gates.gates.policies.policy import Policy
from retention_gates.gates.policies.random import RANDOM
from retention_gates.gates.policies.retention import RETENTION
from retention_gates.gates.policies.streaming_llm import STREAMING_LLM

POLICIES: dict[str, Policy] = {policy.name: policy for policy in (RETENTION, STREAMING_LLM, RANDOM, KEY_NORM)}

__all__ = ["POLICIES", "Policy", "find_policy"]


def find_policy(name: str) -> Policy:
    """The policy of that name.

    Raises:
        ValueError: if there is none, with the nearest name.
    """
    if name in POLICIES:
        return POLICIES[name]
    near = difflib.get_close_matches(str(name), POLICIES, n=1)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    raise ValueError(f"policy={name!r} is unknown: choose among {', '.join(map(repr, POLICIES))}.{hint}")
