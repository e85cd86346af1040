"""The last tokens and nothing else."""

from retention_gates.gates.policies.policy import ScoredPolicy
from retention_gates.gates.policies.streaming_llm import score

# Not even the first tokens stay, as in the window attention that "Efficient Streaming Language Models with Attention
# Sinks", https://arxiv.org/abs/2309.17453, compares with: what losing the attention sinks costs.
SLIDING_WINDOW = ScoredPolicy(name="sliding_window", keeps_sinks=False, score=score)
