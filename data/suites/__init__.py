"""Public suites of questions by their names on the Hub, with prompts, reference answers and scorers."""

from retention_gates.data.suites.aime24 import AIME24
from retention_gates.data.suites.base import Record, Suite, SuiteExample
from retention_gates.data.suites.encoding import EncodedQuestion, encode_questions
from retention_gates.data.suites.gsm8k import GSM8K
from retention_gates.data.suites.infinitebench import INFINITEBENCH
from retention_gates.data.suites.kv_retrieval import KV_RETRIEVAL
from retention_gates.data.suites.longbench import LONGBENCH
from retention_gates.data.suites.longbench_v2 import LONGBENCH_V2
from retention_gates.data.suites.longmemeval import LONGMEMEVAL
from retention_gates.data.suites.longproc import LONGPROC
from retention_gates.data.suites.math500 import MATH500
from retention_gates.data.suites.ruler import RULER
from retention_gates.data.suites.scbench import SCBENCH

SUITES: dict[str, Suite] = {
    suite.name: suite
    for suite in (
        GSM8K,
        MATH500,
        AIME24,
        LONGBENCH,
        LONGBENCH_V2,
        RULER,
        SCBENCH,
        LONGMEMEVAL,
        LONGPROC,
        INFINITEBENCH,
        KV_RETRIEVAL,
    )
}

__all__ = ["SUITES", "EncodedQuestion", "Record", "Suite", "SuiteExample", "encode_questions", "load_suite"]


def load_suite(name: str, *, source: str | None = None, limit: int | None = None) -> list[SuiteExample]:
    """The questions of `SUITE` or `SUITE/SUBSET`, such as `ruler/8192`.

    Args:
        source: a local file in the data set's form, instead of the Hub.
        limit: records to take, the first ones.

    Raises:
        ValueError: there is no such suite or subset, or what `Suite.load` refuses.
    """
    kind, _, subset = name.partition("/")
    if kind not in SUITES:
        raise ValueError(f"unknown suite {kind!r}; allowed are {', '.join(sorted(SUITES))}")
    return SUITES[kind].load(subset or None, source=source, limit=limit)
