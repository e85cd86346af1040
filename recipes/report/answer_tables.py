"""Tables of written answers: how contenders compare, how long answers are, and which of them differ."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, median
from typing import Any

from retention_gates.data.suites import EncodedQuestion
from retention_gates.recipes.report.contents import FULL_CACHE, Duel, contender_name, duels_among, memory_sizes
from retention_gates.recipes.report.plots import has_gates
from retention_gates.trainers.evaluation.paired_statistics import Pairing, Summary, holm, pair

METRIC = "score"
CLEAR = 0.05  # p below which a difference is called clear
EACH = 2  # examples of each kind and task
SHOWN = 700  # characters of a question and of an answer
Panels = dict[str, list[Summary]]
Record = dict[str, Any]


def panels_of(summaries: Sequence[Summary]) -> Panels:
    """Summaries by task."""
    found: Panels = {}
    for summary in summaries:
        found.setdefault(summary.task, []).append(summary)
    return found


def full_of(summaries: Sequence[Summary]) -> Summary:
    return next(summary for summary in summaries if summary.policy == FULL_CACHE)


def duels_of(summaries: Sequence[Summary]) -> list[Duel]:
    """The best gates against the best rival, at each memory size."""
    return duels_among(summaries, METRIC, lambda summary: has_gates(summary.policy))


def findings(panels: Panels) -> list[str]:
    """Sentences in plain text: for each task what the gates keep of the full cache, and the best rival beside."""
    said = []
    for task, summaries in panels.items():
        full = full_of(summaries).scores[METRIC]
        said.append(f"{task}: the full cache scores {_number(full)} on {full_of(summaries).rows} questions.")
        for duel in duels_of(summaries):
            ours, theirs = duel.gates.scores[METRIC], duel.rival.scores[METRIC]
            share = f", {ours.mean / full.mean:.0%} of the full cache's" if full.mean else ""
            clear = "" if duel.pairing.p_value < CLEAR else ", which may be chance"
            lead = "ahead of" if ours.mean > theirs.mean else "behind" if ours.mean < theirs.mean else "level with"
            said.append(
                f"At {duel.memory_size} entries per head the best gates ({_name(duel.gates)}) score {_number(ours)}"
                f"{share}, {lead} the best rival, {_name(duel.rival)}, with {_number(theirs)}: better on "
                f"{duel.pairing.wins} questions, worse on {duel.pairing.losses}, p = "
                f"{duel.pairing.p_value:.2g}{clear}."
            )
        if not duels_of(summaries):
            for size in memory_sizes(summaries):
                of_size = [summary for summary in summaries if summary.memory_size == size]
                best = max(of_size, key=lambda summary: summary.scores[METRIC].mean)
                said.append(f"At {size} entries per head the best is {_name(best)}, {_number(best.scores[METRIC])}.")
    return said


def paired_tests(summaries: Sequence[Summary]) -> tuple[list[str], list[list[str]]]:
    """Headings and rows: every contender against the full cache, and the best gates of a memory size against it.

    p is that of a two-sided sign test over the questions on which scores differ, which is McNemar's exact test where
    answers are right or wrong; the corrected one (Holm) is over the whole column.
    """
    full, duels = full_of(summaries), {duel.memory_size: duel.gates for duel in duels_of(summaries)}
    bounded = sorted((s for s in summaries if s.memory_size is not None), key=lambda s: s.memory_size or 0)
    against_full = [_paired(each, full) for each in bounded]
    gates = [duels.get(each.memory_size or 0) for each in bounded]
    by_gates = [
        None if best in (None, each) else _paired(best, each) for best, each in zip(gates, bounded, strict=True)
    ]
    heads = ["contender", "entries", "score", "better / worse than the full cache", "p", "p corrected"]
    heads += ["best gates better / worse than it", "p", "p corrected"]
    columns = [_cells(against_full), _cells(by_gates)]
    rows = []
    for each, *cells in zip(bounded, *columns, strict=True):
        rows.append(
            [_name(each), str(each.memory_size), _number(each.scores[METRIC]), *(c for pair in cells for c in pair)]
        )
    return heads, rows


def lengths(records: Sequence[Record]) -> tuple[list[str], list[list[str]]]:
    """Headings and rows of the answers of one task: their tokens, the shares that were cut and that loop.

    Answers that say the same again and again are mostly cut, so that a memory that loops less may even score above the
    full cache.
    """
    groups: dict[tuple, list[Record]] = {}
    for record in records:
        if "is_cut" in record:
            groups.setdefault((record["memory_size"] or 0, record["policy"], record["budgets"]), []).append(record)
    heads = ["contender", "entries", "tokens, mean", "median", "longest", "cut", "loop", "score of those that ended"]
    rows = []
    for (size, policy, budgets), own in sorted(groups.items(), key=lambda item: item[0][0]):
        tokens = [record["new_tokens"] for record in own]
        ended = [record["score"] for record in own if not record["is_cut"]]
        rows.append(
            [
                contender_name(policy, budgets),
                str(size) if size else "all",
                *(f"{fmean(tokens):.0f}", f"{median(tokens):.0f}", str(max(tokens))),
                *(f"{fmean(record[what] for record in own):.1%}" for what in ("is_cut", "loops")),
                f"{fmean(ended):.3f}" if ended else "",
            ]
        )
    return heads, rows


@dataclass(frozen=True)
class Said:
    """One contender's answer."""

    name: str
    answer: str
    score: float
    remark: str


@dataclass(frozen=True)
class Example:
    """A question on which contenders differ."""

    task: str
    row: int
    memory_size: int
    question: str
    expected: str
    said: list[Said]


def examples(
    panels: Panels, records: Sequence[Record], questions: Mapping[tuple[str, int], EncodedQuestion]
) -> list[Example]:
    """Of each task some questions on which the full cache, the best gates and the best rival differ.

    At the middle memory size: first those on which only one of them is right or wrong, in the order of the questions.
    """
    found = []
    for task, summaries in panels.items():
        met = duels_of(summaries)
        if not met or (task, 0) not in questions:
            continue
        duel = met[(len(met) - 1) // 2]
        chosen = {_key(full_of(summaries)): "full", _key(duel.gates): "gates", _key(duel.rival): "rival"}
        said: dict[int, dict[str, Record]] = {}
        for record in records:
            key = (record["policy"], record["memory_size"], record["budgets"])
            if record["task"] == task and key in chosen and record.get("sample", 0) == 0:
                said.setdefault(record["row"], {})[chosen[key]] = record
        kinds: dict[tuple, list[int]] = {}
        for row, own in said.items():
            scores = tuple(own[who]["score"] > 0.5 for who in ("full", "gates", "rival"))
            if len(set(scores)) > 1:
                kinds.setdefault(scores, []).append(row)
        for row in [row for rows in kinds.values() for row in rows[:EACH]]:
            question = questions[task, row].question
            answers = [_said(said[row][who]) for who in ("full", "gates", "rival")]
            text, expected = question.messages[-1]["content"], "; ".join(question.references)
            found.append(Example(task, row, duel.memory_size, _end(text), _end(expected), answers))
    return found


def _said(record: Record) -> Said:
    name = contender_name(record["policy"], record["budgets"])
    remarks = [f"{record['new_tokens']} tokens"] + ["cut"] * record["is_cut"] + ["loops"] * record["loops"]
    return Said(name, _end(record["answer"]), record["score"], ", ".join(remarks))


def _end(text: str) -> str:
    return text if len(text) <= SHOWN else "… " + text[-SHOWN:]


def _key(summary: Summary) -> tuple[str, int | None, str | None]:
    return summary.policy, summary.memory_size, summary.budgets


def _paired(one: Summary, other: Summary) -> Pairing:
    return pair(one.scores[METRIC].values, other.scores[METRIC].values, lower_is_better=False)


def _cells(pairings: Sequence[Pairing | None]) -> list[list[str]]:
    corrected = iter(holm([pairing.p_value for pairing in pairings if pairing is not None]))
    return [
        ["", "", ""] if p is None else [f"{p.wins} / {p.losses}", f"{p.p_value:.2g}", f"{next(corrected):.2g}"]
        for p in pairings
    ]


def _name(summary: Summary) -> str:
    return contender_name(summary.policy, summary.budgets)


def _number(score: Any) -> str:
    error = "" if score.standard_error is None else f" ± {score.standard_error:.3f}"
    return f"{score.mean:.3f}{error}"
