"""Whether two mathematical answers in LaTeX are the same."""

import re
from collections.abc import Sequence
from fractions import Fraction

from retention_gates.data.suites.scoring import best, check_references

LEFT_OUT = re.compile(r"\\left|\\right|\\!|\\,|\\;|\\:|\\ |\\\$|\$|\\%|%|\^\{?\\circ\}?|\\displaystyle|\s")
TEXT = re.compile(r"\\(?:text|mathrm|mbox|textbf|mathbf)\{([^{}]*)\}")
FRACTION = re.compile(r"(-?)\\frac\{(-?[\d.]+)\}\{(-?[\d.]+)\}")
PLAIN = re.compile(r"(-?[\d.]+)/(-?[\d.]+)|-?[\d.]+")


def boxed(answer: str) -> str | None:
    r"""What stands in the last \boxed{...} or \fbox{...}, with braces inside it; None if there is none."""
    start = max(answer.rfind(r"\boxed{"), answer.rfind(r"\fbox{"))
    if start < 0:
        return None
    begin = answer.index("{", start) + 1
    depth = 1
    for place in range(begin, len(answer)):
        depth += {"{": 1, "}": -1}.get(answer[place], 0)
        if depth == 0:
            return answer[begin:place]
    return None  # it was cut off


def same(answer: str, reference: str) -> bool:
    r"""Whether two expressions are equal up to notation: spaces, \left, \text, units of degree and percent, 1/2, 0.5.

    Algebra is not done: `x+1` and `1+x` count as different.
    """
    one, other = _plain(answer), _plain(reference)
    if one == other:
        return True
    values = _value(one), _value(other)
    return values[0] is not None and values[0] == values[1]


def boxed_or_last(answer: str) -> str | None:
    r"""The boxed answer; without one, what follows the last "answer is", or the last number."""
    found = boxed(answer)
    if found is not None:
        return found
    stated = re.findall(r"answer is:?\s*\$?([^\n$]+)", answer, flags=re.IGNORECASE)
    if stated:
        return stated[-1].strip().rstrip(".")
    numbers = re.findall(r"-?\d[\d,]*(?:\.\d+)?", answer)
    return numbers[-1] if numbers else None


@best
def math_answer(answer: str, reference: str) -> float:
    """Whether the final answer equals the reference up to notation."""
    found = boxed_or_last(answer)
    return float(found is not None and same(found, reference))


def integer_answer(answer: str, references: Sequence[str]) -> float:
    """Whether the final answer is the same integer, with or without leading zeros, as in the AIME (0 to 999)."""
    check_references(references)
    found = boxed_or_last(answer)
    if found is None:
        return 0.0
    value = _value(_plain(found))
    return float(value is not None and any(value == int(reference) for reference in references))


def _plain(text: str) -> str:
    text = TEXT.sub(r"\1", text)
    text = (
        text.replace("\\dfrac", "\\frac").replace("\\tfrac", "\\frac").replace("\\cdot", "*").replace("\\times", "*")
    )
    text = LEFT_OUT.sub("", text).rstrip(".")
    text = re.sub(r"\\frac(\d)(\d)", r"\\frac{\1}{\2}", text)
    text = re.sub(r"\\sqrt(\w)", r"\\sqrt{\1}", text)
    text = re.sub(r"(?<=\d),(?=\d{3}(?!\d))", "", text)
    return re.sub(r"^[a-zA-Z]=", "", text)


def _value(text: str) -> Fraction | None:
    """The number that a plain decimal or fraction stands for."""
    text = FRACTION.sub(r"\1\2/\3", text)
    if not PLAIN.fullmatch(text):
        return None
    try:
        top, _, bottom = text.partition("/")
        return Fraction(top) / Fraction(bottom or "1")
    except (ValueError, ZeroDivisionError):
        return None
