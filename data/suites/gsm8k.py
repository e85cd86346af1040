"""GSM8K: word problems of grade-school arithmetic (arXiv 2110.14168).

Asked without examples, and for a boxed answer; the wording is ours. lm-eval's task `gsm8k` gives five examples.
"""

from retention_gates.data.suites.base import Record, Suite, SuiteExample
from retention_gates.data.suites.math_answers import math_answer

MAX_NEW_TOKENS = 1024
INSTRUCTION = "Reason step by step and put the final answer into \\boxed{}."


def read(record: Record, subset: str) -> list[SuiteExample]:
    """A problem, whose answer stands behind `####` at the end of its solution."""
    solution = record.text("answer")
    _, mark, answer = solution.rpartition("####")
    if not mark or not answer.strip():
        raise ValueError(f"gsm8k: field 'answer' of {record.name} has no answer behind '####': {solution[-60:]!r}")
    prompt = f"{record.text('question').strip()}\n\n{INSTRUCTION}"
    messages = ({"role": "user", "content": prompt},)
    return [SuiteExample("gsm8k", messages, (answer.strip().replace(",", ""),), MAX_NEW_TOKENS, math_answer)]


GSM8K = Suite("gsm8k", "openai/gsm8k", ("main", "socratic"), "test", read)
