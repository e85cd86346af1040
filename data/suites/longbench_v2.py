"""LongBench v2: multiple-choice questions over contexts of 8K to 2M words (arXiv 2412.15204)."""

from retention_gates.data.suites.base import Record, Suite, SuiteExample
from retention_gates.data.suites.prompted import read_prompted
from retention_gates.data.suites.scoring import choice


def read(record: Record, subset: str) -> list[SuiteExample]:
    """A question with four choices; `cot` asks for reasoning first."""
    answer = record.text("answer").strip()
    if answer not in ("A", "B", "C", "D"):
        raise ValueError(f"longbench_v2: field 'answer' of {record.name} is {answer!r} and should be A, B, C or D")
    return [read_prompted(record, f"longbench_v2/{subset}", (answer,), choice)]


LONGBENCH_V2 = Suite("longbench_v2", "Xnhyacinth/LongBench-v2", ("0shot", "cot"), "test", read)
