"""MATH-500: 500 competition problems (MATH, arXiv 2103.03874; the choice of 500: arXiv 2305.20050).

Asked without examples, and for a boxed answer; the wording is ours. Published figures differ in their prompts and in
how they compare: by strings in a normal form, by sympy, or by a model. Here it is math-verify on the last boxed
expression, else on what follows "answer is", else on the last number. Reasoning models are published with 32,768
tokens; answers that are cut at 4,096 are read as far as they went, so give max_new_tokens for such models.
"""

from retention_gates.data.suites.base import Record, Suite, SuiteExample
from retention_gates.data.suites.gsm8k import INSTRUCTION
from retention_gates.data.suites.math_answers import check_installed, math_answer

MAX_NEW_TOKENS = 4096


def read(record: Record, subset: str) -> list[SuiteExample]:
    """A problem with its answer in LaTeX."""
    check_installed("math500")
    messages = ({"role": "user", "content": f"{record.text('problem').strip()}\n\n{INSTRUCTION}"},)
    return [SuiteExample("math500", messages, (record.text("answer"),), MAX_NEW_TOKENS, math_answer)]


MATH500 = Suite("math500", "HuggingFaceH4/MATH-500", ("default",), "test", read)
