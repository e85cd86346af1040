"""Eviction policies: the trained gates, and the untrained rivals that they are measured against."""

import difflib

from retention_gates.gates.policies.citrus import CITRUS
from retention_gates.gates.policies.expected_attention import EXPECTED_ATTENTION
from retention_gates.gates.policies.h2o import H2O
from retention_gates.gates.policies.held import Held, Setting
from retention_gates.gates.policies.key_norm import KEY_NORM
from retention_gates.gates.policies.keydiff import KEYDIFF
from retention_gates.gates.policies.lagkv import LAGKV
from retention_gates.gates.policies.merging import MERGING
from retention_gates.gates.policies.morphkv import MORPHKV
from retention_gates.gates.policies.policy import FeedbackPolicy, NewTokens, Policy, ScoredPolicy, as_feedback
from retention_gates.gates.policies.raas import RAAS
from retention_gates.gates.policies.random import RANDOM
from retention_gates.gates.policies.retention import RETENTION
from retention_gates.gates.policies.rkv import RKV
from retention_gates.gates.policies.sliding_window import SLIDING_WINDOW
from retention_gates.gates.policies.snapkv import SNAPKV
from retention_gates.gates.policies.streaming_llm import STREAMING_LLM
from retention_gates.gates.policies.tova import TOVA
from retention_gates.gates.policies.triattention import TRIATTENTION
from retention_gates.gates.policies.value_norm import VALUE_NORM
from retention_gates.gates.policies.vase import VASE

KNOWN_AHEAD = (RETENTION, STREAMING_LLM, SLIDING_WINDOW, RANDOM, KEY_NORM, VALUE_NORM)
FED_BACK = (
    *(H2O, TOVA, SNAPKV, MORPHKV, RAAS, RKV, KEYDIFF, LAGKV, EXPECTED_ATTENTION, TRIATTENTION, VASE, CITRUS, MERGING),
)
POLICIES: dict[str, Policy] = {policy.name: policy for policy in (*KNOWN_AHEAD, *FED_BACK)}

__all__ = [
    "POLICIES",
    "FeedbackPolicy",
    "Held",
    "NewTokens",
    "Policy",
    "ScoredPolicy",
    "Setting",
    "as_feedback",
    "find_policy",
]


def find_policy(policy: str | Policy) -> Policy:
    """The policy of that name, or the one given.

    Raises:
        ValueError: if there is none, with the nearest name.
    """
    if isinstance(policy, Policy):
        return policy
    if isinstance(policy, str) and policy in POLICIES:
        return POLICIES[policy]
    near = difflib.get_close_matches(str(policy), POLICIES, n=1)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    raise ValueError(f"policy={policy!r} is unknown: choose among {', '.join(map(repr, POLICIES))}.{hint}")
