"""Seeded recall tasks: a share of the training rows, and a score that tells memory policies apart."""

from collections.abc import Sequence
from dataclasses import fields
from typing import Any

from retention_gates.data.tasks.base import Filler, Task, TaskExample
from retention_gates.data.tasks.code_lookup import CodeLookup
from retention_gates.data.tasks.common_words import CommonWords
from retention_gates.data.tasks.long_generation import LongGeneration
from retention_gates.data.tasks.multi_key import MultiKey
from retention_gates.data.tasks.multi_turn import MultiTurn
from retention_gates.data.tasks.multi_value import MultiValue
from retention_gates.data.tasks.passage_repeat import PassageRepeat
from retention_gates.data.tasks.passkey import Passkey
from retention_gates.data.tasks.pitfalls import Pitfalls
from retention_gates.data.tasks.sentence_recall import SentenceRecall
from retention_gates.data.tasks.variable_tracking import VariableTracking

KINDS: tuple[type[Task], ...] = (
    PassageRepeat,
    SentenceRecall,
    Passkey,
    CodeLookup,
    MultiKey,
    MultiValue,
    VariableTracking,
    CommonWords,
    LongGeneration,
    MultiTurn,
    Pitfalls,
)
TASKS: dict[str, Task] = {kind.kind: kind() for kind in KINDS}

__all__ = ["TASKS", "Filler", "Task", "TaskExample", "build_task", "build_tasks"]


def build_task(name: str) -> Task:
    """The task of that name, with settings behind a colon if not the usual ones: `passkey:needles=3,depth=0.5`.

    Raises:
        ValueError: there is no such task or setting, or a value is not allowed.
    """
    kind, _, settings = name.partition(":")
    if kind not in TASKS:
        raise ValueError(f"unknown task {kind!r}; allowed are {', '.join(sorted(TASKS))}")
    task = type(TASKS[kind])
    defaults = {field.name: field.default for field in fields(task)}
    chosen: dict[str, Any] = {}
    for setting in filter(None, settings.split(",")):
        key, _, value = (part.strip() for part in setting.partition("="))
        if key not in defaults or key in chosen or not value:
            raise ValueError(
                f"the task {name!r} has {setting!r}, which should be NAME=VALUE with each of these names once at "
                f"most: {', '.join(defaults)}"
            )
        chosen[key] = _read_value(name, key, value, defaults[key])
    return task(**chosen)


def build_tasks(names: Sequence[str]) -> list[Task]:
    """The tasks of those names, in order."""
    if isinstance(names, str):
        raise ValueError(f"tasks={names!r} is a string; give a list of names, such as [{names}]")
    return [build_task(name) for name in names]


def _read_value(task: str, key: str, text: str, default: Any) -> Any:
    """A whole number where the usual value is one, a name where it is one, and else a number."""
    if isinstance(default, str):
        return text
    try:
        return int(text) if isinstance(default, int) or key == "distance" else float(text)
    except ValueError:
        raise ValueError(f"the task {task!r} has {key}={text}, which is not a number of the right kind") from None
