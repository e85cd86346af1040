"""LongProc: long outputs that follow a procedure step by step (arXiv 2501.05414).

The prompts are part of the data; a local file may have the Hub's form or the repository's (`longproc_files.py`).
Scores are the published strict ones, 1 or 0 for a whole output (F1 for tables); the partial credit that is published
beside them is left out, and so is translating pseudocode into C++, whose score compiles and runs what the model wrote.
Answers may have half as many tokens again as the references of their size.
"""

import json
from collections.abc import Callable
from functools import partial
from typing import Any

from retention_gates.data.suites.base import Record, Scorer, Suite, SuiteExample
from retention_gates.data.suites.longproc_files import convert
from retention_gates.data.suites.procedures import (
    countdown_solved,
    same_beliefs,
    same_route,
    same_trip,
    table_f1,
)

LONGEST = {"0.5k": 1024, "2k": 3072, "8k": 9216}  # tokens
SIZES = {
    "path_traversal": ("0.5k", "2k", "8k"),
    "html_to_tsv": ("0.5k", "2k", "8k"),
    "tom_tracking": ("0.5k", "2k", "8k"),
    "countdown": ("0.5k", "2k", "8k"),
    "travel_planning": ("2k", "8k"),
}


def read(record: Record, subset: str) -> list[SuiteExample]:
    """The task of a record."""
    kind, _, size = subset.rpartition("_")
    scorer = _scorer(kind, record)
    messages = ({"role": "user", "content": record.text("input_prompt")},)
    references = (record.text("reference_output"),)
    return [SuiteExample(f"longproc/{subset}", messages, references, LONGEST[size], scorer)]


def _scorer(kind: str, record: Record) -> Scorer:
    plain: dict[str, Scorer] = {"path_traversal": same_route, "tom_tracking": same_beliefs, "html_to_tsv": table_f1}
    if kind in plain:
        return plain[kind]
    details = _details(record)
    if kind == "countdown":
        numbers, target = details("nums", list), details("target", int)
        return partial(countdown_solved, numbers, target)
    cities = details("ground_truth_cities", str).split("**")
    days = details("ground_truth_durations", str).split("**")
    return partial(same_trip, [city for city in cities if city], [int(day) for day in days if day])


def _details(record: Record) -> Callable[[str, type], Any]:
    """Reads fields of the JSON text in the field `metadata`."""
    text = record.text("metadata")
    try:
        columns = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"longproc: field 'metadata' of {record.name} is not JSON: {error}") from error
    if not isinstance(columns, dict):
        raise ValueError(f"longproc: field 'metadata' of {record.name} must hold an object: {text[:60]!r}")
    return Record("longproc", f"{record.name}, metadata", columns).get


SUBSETS = tuple(f"{kind}_{size}" for kind, sizes in SIZES.items() for size in sizes)
LONGPROC = Suite("longproc", "PrincetonPli/LongProc", SUBSETS, "test", read, convert=convert)
