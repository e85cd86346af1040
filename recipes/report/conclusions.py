"""The main findings of a comparison in a few plain sentences, also where a rival wins."""

from retention_gates.recipes.report.contents import (
    TEXT,
    Duel,
    ModelReport,
    best,
    better,
    contender_name,
    duels,
    memory_sizes,
    metric_of,
    panel_title,
)
from retention_gates.trainers.evaluation.paired_statistics import Summary

CLEAR = 0.05  # p below which a difference is called clear


def findings(model: ModelReport) -> list[str]:
    """Sentences in plain text, the most important first."""
    said: list[str] = []
    tasks: list[tuple[str, list[Duel]]] = []
    for task, length, summaries in model.panels():
        met = duels(model, task, summaries)
        if task == TEXT:
            said += _on_text(met, summaries)
        elif "/" not in task:  # a task's parts are in the tables only
            tasks.append((panel_title(task, length), met))
    return said + _on_tasks(tasks)


def _on_text(met: list[Duel], summaries: "list[Summary]") -> list[str]:
    if not met:
        return _leaders(summaries)
    said = []
    won = [duel for duel in met if better("kl", duel.gates.scores["kl"].mean, duel.rival.scores["kl"].mean)]
    if won:
        most = min(won, key=lambda duel: duel.gates.scores["kl"].mean / duel.rival.scores["kl"].mean)
        less = 1 - most.gates.scores["kl"].mean / most.rival.scores["kl"].mean
        sizes = "every memory size" if len(won) == len(met) else f"{len(won)} of {len(met)} memory sizes"
        said.append(
            f"Text: the trained gates stay closest to the full cache at {sizes}. The lead is largest at "
            f"{most.memory_size} entries per head, {less:.0%} less lost: {_duel(most)}."
        )
    said += [
        f"Text: at {duel.memory_size} entries per head a rival is ahead of the gates: {_duel(duel)}."
        for duel in met
        if duel not in won
    ]
    return said


def _duel(duel: Duel) -> str:
    ours, theirs = duel.gates.scores["kl"].mean, duel.rival.scores["kl"].mean
    pairing = duel.pairing
    rows = pairing.wins + pairing.losses + pairing.ties
    return (
        f"KL {ours:.3f} ({contender_name(duel.gates.policy, duel.gates.budgets)}) against {theirs:.3f} nats per token "
        f"({contender_name(duel.rival.policy, duel.rival.budgets)}, the best other policy); better on {pairing.wins} "
        f"of {rows} passages ({_p(pairing.p_mean)} for the mean, uncorrected)"
    )


def _p(value: float) -> str:
    return f"p = {value:.2g}" if value >= 1e-3 else "p < 0.001"


def _leaders(summaries: "list[Summary]") -> list[str]:
    said = []
    for size in memory_sizes(summaries):
        first = best("kl", [summary for summary in summaries if summary.memory_size == size])
        if first is not None:
            name = contender_name(first.policy, first.budgets)
            said.append(f"Text: at {size} entries per head {name} loses least, KL {first.scores['kl'].mean:.3f}.")
    return said


def _on_tasks(tasks: list[tuple[str, list[Duel]]]) -> list[str]:
    cells = [(title, duel) for title, met in tasks for duel in met]
    if not cells:
        return []
    metric = metric_of("task")
    ahead = sum(better(metric, d.gates.scores[metric].mean, d.rival.scores[metric].mean) for _, d in cells)
    lost = [(t, d) for t, d in cells if better(metric, d.rival.scores[metric].mean, d.gates.scores[metric].mean)]
    clearly = sum(duel.pairing.p_mean < CLEAR for _, duel in lost)
    said = [
        f"Recall tasks: of {len(cells)} pairs of task and memory size the gates are ahead of the best other policy in "
        f"{ahead}, equal in {len(cells) - ahead - len(lost)} and behind in {len(lost)}"
        + (f", of which {clearly} with p < {CLEAR} before any correction." if lost else ".")
    ]
    where = [
        f"{title} at {duel.memory_size} ({contender_name(duel.rival.policy, duel.rival.budgets)} "
        f"{duel.rival.scores[metric].mean:.2f}, gates {duel.gates.scores[metric].mean:.2f})"
        for title, duel in lost
    ]
    return said + ([f"A rival is ahead in: {'; '.join(where)}."] if where else [])
