"""Whether two mathematical answers are the same, by the package math-verify."""

import re
import threading
from collections.abc import Sequence
from functools import lru_cache
from importlib.util import find_spec
from typing import Any

from retention_gates.data.suites.scoring import best, check_references

INSTALLED = find_spec("math_verify") is not None
SECONDS = 5  # to parse an answer, and as many to compare it: a tower of powers would take for ever
WHOLE = re.compile(r"-?(?:\d+|\d{1,3}(?:,\d{3})+)")


def check_installed(suite: str) -> None:
    """Raises ValueError if the package math-verify is not there."""
    if not INSTALLED:
        raise ValueError(
            f"{suite}: answers are compared by the package math-verify: pip install 'retention-gates[eval]'."
        )


def boxed(answer: str) -> str | None:
    r"""Gives the content of the last \boxed{...} or \fbox{...}, with braces inside it; None if there is none."""
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


def same(answer: str, reference: str) -> bool:
    """Whether two expressions in LaTeX are equal, as math-verify says.

    Whole numbers are compared as such, which says the same in a thousandth of the time.
    """
    one, other = answer.strip(), reference.strip()
    if one == other:
        return True
    if WHOLE.fullmatch(one) and WHOLE.fullmatch(other):
        return one.replace(",", "").lstrip("0") == other.replace(",", "").lstrip("0")
    return _verified(one, other)


@lru_cache(maxsize=10_000)
def _verified(answer: str, reference: str) -> bool:
    import math_verify  # 1 s, for sympy

    return bool(math_verify.verify(_parsed(reference), _parsed(answer), timeout_seconds=_seconds()))


@lru_cache(maxsize=10_000)  # 5 to 100 ms each, and references come once for every contender
def _parsed(text: str) -> list[Any]:
    import math_verify

    target = (math_verify.LatexExtractionConfig(boxed_match_priority=0),)
    return math_verify.parse(rf"\boxed{{{text}}}", extraction_config=target, parsing_timeout=_seconds())


def _seconds() -> int | None:
    """The limit, as far as there is one: it is an alarm, which only the main thread can set."""
    return SECONDS if threading.current_thread() is threading.main_thread() else None


@best
def math_answer(answer: str, reference: str) -> float:
    """Whether the final answer equals the reference."""
    found = boxed_or_last(answer)
    return float(found is not None and same(found, reference))


def integer_answer(answer: str, references: Sequence[str]) -> float:
    """Whether the final answer is the same integer, with or without leading zeros, as in the AIME (0 to 999)."""
    check_references(references)
    return math_answer(answer, [str(int(reference)) for reference in references])
