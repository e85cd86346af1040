"""InfiniteBench: contexts of about 100K tokens and more, real and synthetic (arXiv 2402.13718)."""

from retention_gates.data.suites.base import Record, Scorer, Suite, SuiteExample
from retention_gates.data.suites.prompted import read_prompted
from retention_gates.data.suites.scoring import (
    character_f1,
    choice,
    contains_any,
    first_number,
    last_number,
    number_sequence,
    rouge_l,
    word_f1,
)

SCORERS: dict[str, Scorer] = {
    "passkey": first_number,
    "kv_retrieval": contains_any,
    "number_string": first_number,
    "longdialogue_qa_eng": contains_any,
    "longbook_qa_eng": word_f1,
    "longbook_qa_chn": character_f1,
    "longbook_choice_eng": choice,
    "longbook_sum_eng": rouge_l,
    "code_run": last_number,
    "code_debug": choice,
    "math_find": first_number,
    "math_calc": number_sequence,
}


def read(record: Record, subset: str) -> list[SuiteExample]:
    """A question of the task that the subset names."""
    return [read_prompted(record, f"infinitebench/{subset}", record.texts("answer"), SCORERS[subset])]


INFINITEBENCH = Suite("infinitebench", "MaxJeblick/InfiniteBench", tuple(SCORERS), "test", read)
