"""GSM8K: word problems of grade-school arithmetic (arXiv 2110.14168).

Asked without examples, and for a boxed answer; the wording is ours. Published figures of base models have five or
eight worked examples before the question (lm-eval's task `gsm8k`: five), and read the number behind `####` or the
last one. Here the last boxed expression counts, else what follows "answer is", else the last number, and math-verify
says whether it is the reference: "18 dollars" and "18.00" are 18. An answer that is cut at 1,024 tokens is read as
far as it went.
"""

from retention_gates.data.suites.base import Record, Suite, SuiteExample
from retention_gates.data.suites.math_answers import check_installed, math_answer

MAX_NEW_TOKENS = 1024
INSTRUCTION = "Reason step by step and put the final answer into \\boxed{}."


def read(record: Record, subset: str) -> list[SuiteExample]:
    """A problem, whose answer stands behind `####` at the end of its solution."""
    check_installed("gsm8k")
    solution = record.text("answer")
    _, mark, answer = solution.rpartition("####")
    if not mark or not answer.strip():
        raise ValueError(f"gsm8k: field 'answer' of {record.name} has no answer behind '####': {solution[-60:]!r}")
    prompt = f"{record.text('question').strip()}\n\n{INSTRUCTION}"
    messages = ({"role": "user", "content": prompt},)
    return [SuiteExample("gsm8k", messages, (answer.strip().replace(",", ""),), MAX_NEW_TOKENS, math_answer)]


GSM8K = Suite("gsm8k", "openai/gsm8k", ("main", "socratic"), "test", read)
