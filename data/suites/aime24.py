"""AIME 2024: the 30 problems of both exams; answers are integers from 0 to 999.

Asked without examples, and for a boxed answer; the wording is ours. Published figures are means over 16 or more
answers to each question, drawn at a temperature such as 0.6: give samples and temperature for these. math-verify
compares.
"""

from retention_gates.data.suites.base import Record, Suite, SuiteExample
from retention_gates.data.suites.gsm8k import INSTRUCTION
from retention_gates.data.suites.math_answers import check_installed, integer_answer

MAX_NEW_TOKENS = 32768


def read(record: Record, subset: str) -> list[SuiteExample]:
    """A problem with its answer, an integer."""
    check_installed("aime24")
    answer = str(record.get("Answer", (int, str))).strip()
    if not answer.isdigit() or int(answer) > 999:
        raise ValueError(f"aime24: field 'Answer' of {record.name} is {answer!r} and should be an integer of 0 to 999")
    messages = ({"role": "user", "content": f"{record.text('Problem').strip()}\n\n{INSTRUCTION}"},)
    return [SuiteExample("aime24", messages, (answer,), MAX_NEW_TOKENS, integer_answer)]


AIME24 = Suite("aime24", "Maxwell-Jia/AIME_2024", ("default",), "train", read)
