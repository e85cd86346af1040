"""Data sets in the form of kvpress's evaluation: the prompt's wording is part of the data.

Each record has `context`, `question`, `answer_prefix` and `max_new_tokens`. The user's message is context and
question, and the answer begins with the prefix.
"""

from collections.abc import Sequence

from retention_gates.data.suites.base import Record, Scorer, SuiteExample


def read_prompted(
    record: Record, task: str, references: Sequence[str], scorer: Scorer, *, stop: tuple[str, ...] = ()
) -> SuiteExample:
    """The question of a record in that form."""
    # some tasks have everything in the context, and some begin no answer
    content = record.text("context") + record.get("question", str)
    prefix = record.get("answer_prefix", str)
    return SuiteExample(
        task,
        ({"role": "user", "content": content},),
        tuple(references),
        record.get("max_new_tokens", int),
        scorer,
        answer_prefix=prefix,
        stop=stop,
    )
