"""RULER: synthetic retrieval, tracing, aggregation and question answering at chosen lengths (arXiv 2404.06654)."""

from retention_gates.data.suites.base import Record, Suite, SuiteExample
from retention_gates.data.suites.prompted import read_prompted
from retention_gates.data.suites.scoring import contains_any, contains_share

TASKS = (
    "niah_single_1", "niah_single_2", "niah_single_3", "niah_multikey_1", "niah_multikey_2", "niah_multikey_3",
    "niah_multivalue", "niah_multiquery", "vt", "cwe", "fwe", "qa_1", "qa_2",
)  # fmt: skip


def read(record: Record, subset: str) -> list[SuiteExample]:
    """A question of one of 13 tasks. Question answering needs one of the answers, every other task all of them."""
    task = record.text("task")
    if task not in TASKS:
        raise ValueError(f"ruler: field 'task' of {record.name} is {task!r}; known are {', '.join(TASKS)}")
    scorer = contains_any if task.startswith("qa_") else contains_share
    return [read_prompted(record, f"ruler/{task}", record.texts("answer"), scorer)]


RULER = Suite("ruler", "simonjegou/ruler", ("4096", "8192", "16384"), "test", read)
