"""MATH-500: 500 competition problems (MATH, arXiv 2103.03874; the choice of 500: arXiv 2305.20050).

Asked without examples, and for a boxed answer; the wording is ours.
"""

from retention_gates.data.suites.base import Record, Suite, SuiteExample
from retention_gates.data.suites.gsm8k import INSTRUCTION
from retention_gates.data.suites.math_answers import math_answer

MAX_NEW_TOKENS = 4096


def read(record: Record, subset: str) -> list[SuiteExample]:
    """A problem with its answer in LaTeX."""
    messages = ({"role": "user", "content": f"{record.text('problem').strip()}\n\n{INSTRUCTION}"},)
    return [SuiteExample("math500", messages, (record.text("answer"),), MAX_NEW_TOKENS, math_answer)]


MATH500 = Suite("math500", "HuggingFaceH4/MATH-500", ("default",), "test", read)
