"""The content of the reports, and the words that both of them use."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from retention_gates.recipes.report.gate_reading import Reading
from retention_gates.trainers.evaluation.paired_statistics import LOWER_IS_BETTER as LOWER
from retention_gates.trainers.evaluation.paired_statistics import Pairing, Summary, pair

if TYPE_CHECKING:  # it imports this module
    from retention_gates.recipes.report.differing_answers import Answers


FULL_CACHE, TEXT = "full", "text"
METRICS = {  # metric -> heading and digits after the point
    "kl": ("KL to the full cache, nats per token", 3),
    "perplexity_ratio": ("perplexity / full cache's", 3),
    "agreement": ("same top-1 token", 3),
    "token_accuracy": ("answer tokens right", 2),
    "exact": ("answers exact", 2),
    "score": ("score", 3),  # of written answers
}
LOWER_IS_BETTER = ("kl", "perplexity_ratio")
NAMES = {  # as their papers write them
    "retention": "gates",
    "streaming_llm": "StreamingLLM",
    "h2o": "H2O",
    "tova": "TOVA",
    "snapkv": "SnapKV",
    "morphkv": "MorphKV",
    "raas": "RaaS",
    "rkv": "R-KV",
    "keydiff": "KeyDiff",
    "lagkv": "LagKV",
    "expected_attention": "Expected Attention",
    "triattention": "TriAttention",
    "vase": "VaSE",
    "citrus": "CItruS",
}
Key = tuple[str, int, str]  # policy, memory size, budgets


@dataclass
class Shown:
    """The parts of the gates that heat maps show."""

    half_lives: "torch.Tensor"  # [layers, H], tokens
    rows: int  # that the medians are over
    reading: "Reading"  # of one text
    layers: list[int]  # indices in the model
    memory_size: int
    budgets: str


@dataclass
class ModelReport:
    """Everything that was found out about one model."""

    title: str
    facts: dict[str, Any]  # origin, versions, device
    summaries: "list[Summary]"
    records: list[dict[str, Any]]
    reference: str | None
    gated: list[str]  # the policies of trained gates
    bytes: dict[Key | None, int]  # per sequence, by contender; None: the full cache after the text's length
    shown: Shown | None
    answers: "list[Answers]"

    def panels(self) -> "list[tuple[str, int | None, list[Summary]]]":
        """Task, length and summaries of what was measured together, the text first."""
        found: dict[tuple[str, int | None], list[Summary]] = {}
        for summary in self.summaries:
            found.setdefault((summary.task, summary.length), []).append(summary)
        return [(task, length, summaries) for (task, length), summaries in found.items()]

    def is_gated(self, summary: "Summary") -> bool:
        return summary.policy.split("+")[0] in self.gated


def metric_of(task: str) -> str:
    """The metric by which contenders are ranked and paired."""
    return "kl" if task == TEXT else "token_accuracy"


def metric_in(summaries: "Sequence[Summary]") -> str:
    """The metric that ranks and pairs one panel's contenders: their task's, or the score of written answers."""
    first = summaries[0]
    return "score" if "score" in first.scores else metric_of(first.task)


def panel_title(task: str, length: int | None) -> str:
    name = "Text" if task == TEXT else task[:1].upper() + task[1:].replace("_", " ")
    return name if length is None else f"{name}, {length:,} tokens"


def contender_name(policy: str, budgets: str | None) -> str:
    """As people read it: "gates, calibrated", "StreamingLLM"; uniform budgets go without saying but for gates."""
    if policy == FULL_CACHE:
        return "full cache"
    name, plus, addition = policy.partition("+")
    shown = NAMES.get(name, name.replace("_", " ")) + plus + addition
    return shown if budgets == "uniform" and name != "retention" else f"{shown}, {budgets}"


def better(metric: str, one: float, other: float) -> bool:
    return one < other if metric in LOWER_IS_BETTER else one > other


def best(metric: str, summaries: "list[Summary]") -> "Summary | None":
    """The one that is better than all others; None if several are, or if there is nothing to be better than."""
    sign = 1 if metric in LOWER_IS_BETTER else -1
    ranked = sorted(summaries, key=lambda summary: sign * summary.scores[metric].mean)
    if len(ranked) < 2 or ranked[0].scores[metric].mean == ranked[1].scores[metric].mean:
        return None
    return ranked[0]


def by_contender(summaries: "list[Summary]", metric: str) -> "list[tuple[str, dict[int | None, Summary]]]":
    """Names with the summaries at every memory size: the full cache (None) first, then from best to worst on average.

    The average is over memory sizes, which are the same for all.
    """
    found: dict[str, dict[int | None, Summary]] = {}
    for summary in summaries:
        found.setdefault(contender_name(summary.policy, summary.budgets), {})[summary.memory_size] = summary
    sign = 1 if metric in LOWER_IS_BETTER else -1

    def rank(entry: "tuple[str, dict[int | None, Summary]]") -> tuple[bool, float]:
        scores = [summary.scores[metric].mean for summary in entry[1].values()]
        return None not in entry[1], sign * sum(scores) / len(scores)

    return sorted(found.items(), key=rank)


def memory_sizes(summaries: "Sequence[Summary]") -> list[int]:
    return sorted({summary.memory_size for summary in summaries if summary.memory_size is not None})


@dataclass
class Duel:
    """The best of the gates against the best of the others, at one memory size."""

    memory_size: int
    gates: "Summary"
    rival: "Summary"
    pairing: "Pairing"


def duels(model: ModelReport, task: str, summaries: "list[Summary]") -> list[Duel]:
    """One for each memory size; none if there are no gates or no rivals."""
    return duels_among(summaries, metric_of(task), model.is_gated)


def duels_among(summaries: "Sequence[Summary]", metric: str, is_gated: "Callable[[Summary], bool]") -> "list[Duel]":
    """One for each memory size; none if there are no gates or no rivals.

    Both are chosen by the scores that they are then compared by. Of many rivals, the one that looks best is partly
    lucky, which works against the gates.
    """
    sign = 1 if metric in LOWER_IS_BETTER else -1
    found = []
    for size in memory_sizes(summaries):
        of_size = [summary for summary in summaries if summary.memory_size == size]
        ranked = sorted(of_size, key=lambda summary: sign * summary.scores[metric].mean)
        gates = [summary for summary in ranked if is_gated(summary)]
        rivals = [summary for summary in ranked if not is_gated(summary)]
        if gates and rivals:
            values = [each[0].scores[metric].values for each in (gates, rivals)]
            found.append(Duel(size, gates[0], rivals[0], pair(*values, lower_is_better=LOWER[metric])))
    return found


def pareto_front(metric: str, points: "Sequence[tuple[float, Summary]]") -> "list[tuple[float, Summary]]":
    """Those that no other beats with the same memory or less, in order of memory (bytes or entries)."""
    sign = 1 if metric in LOWER_IS_BETTER else -1
    front: list[tuple[float, Summary]] = []
    for size, summary in sorted(points, key=lambda point: (point[0], sign * point[1].scores[metric].mean)):
        if not front or better(metric, summary.scores[metric].mean, front[-1][1].scores[metric].mean):
            front.append((size, summary))
    return front
