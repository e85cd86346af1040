"""Seeded recall tasks: a share of the training rows, and a score that tells memory policies apart."""

from collections.abc import Sequence

from retention_gates.data.tasks.base import Filler, Task, TaskExample
from retention_gates.data.tasks.code_lookup import CodeLookup
from retention_gates.data.tasks.passage_repeat import PassageRepeat
from retention_gates.data.tasks.passkey import Passkey
from retention_gates.data.tasks.sentence_recall import SentenceRecall

TASKS: dict[str, Task] = {task.name: task for task in (PassageRepeat(), SentenceRecall(), Passkey(), CodeLookup())}

__all__ = ["TASKS", "Filler", "Task", "TaskExample", "build_task", "build_tasks"]


def build_task(name: str) -> Task:
    """The task of that name.

    Raises:
        ValueError: there is none.
    """
    if name not in TASKS:
        raise ValueError(f"unknown task {name!r}; allowed are {', '.join(sorted(TASKS))}")
    return TASKS[name]


def build_tasks(names: Sequence[str]) -> list[Task]:
    """The tasks of those names, in order."""
    if isinstance(names, str):
        raise ValueError(f"tasks={names!r} is a string; give a list of names, such as [{names}]")
    return [build_task(name) for name in names]
