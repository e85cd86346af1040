"""Metrics of LongProc's outputs (arXiv 2501.05414), each a score in 0 to 1."""

import csv
import re
import string
from collections.abc import Sequence
from fractions import Fraction
from itertools import pairwise

from retention_gates.data.suites.scoring import ARTICLES, best

FILLER = re.compile(r"\b(a|an|the|on|in|at|step|thinks|think|believes|believe|is|are|of|location|know|knows|belief)\b")
EQUATION = re.compile(r"\s*(-?\d+)\s*([-+*/])\s*(-?\d+)\s*=\s*(-?\d+)\s*")
FLIGHT = re.compile(r"Day (\d+)\b.*\bfrom (\w+) to (\w+)")
STAY = re.compile(r"\b(\d+)-(\d+)\b")


def tagged(answer: str, tag: str) -> str | None:
    """Gives the text between <tag> and </tag>."""
    found = re.search(rf"<{tag}>(.*?)</{tag}>", answer, flags=re.DOTALL)
    return found.group(1).strip() if found else None


@best
def same_route(answer: str, reference: str) -> float:
    """Whether the tag Route holds the reference route."""
    return float(tagged(answer, "Route") == reference.strip())


@best
def same_beliefs(answer: str, reference: str) -> float:
    """Whether the lines that begin with a dash say the same, one by one, up to filler words."""
    wanted = _beliefs(reference)
    if not wanted:
        raise ValueError(f"the reference has no line that begins with a dash: {reference[:60]!r}")
    return float(_beliefs(answer) == wanted)


@best
def table_f1(answer: str, reference: str) -> float:
    """F1 over the rows of a table in tab-separated values; the answer's stands in a block ```tsv, or is all of it."""
    wanted = _rows(reference)
    if not wanted:
        raise ValueError(f"the reference is no table with a heading and a row: {reference[:60]!r}")
    found = re.search(r"```tsv(.*?)(?:```|\Z)", answer, flags=re.DOTALL)
    rows = _rows(found.group(1) if found else answer)
    if not rows:
        return 0.0
    precision = sum(row in wanted for row in rows) / len(rows)
    recall = sum(row in rows for row in wanted) / len(wanted)
    return 2 * precision * recall / (precision + recall) if precision + recall else 0.0


def countdown_solved(numbers: Sequence[int], target: int, answer: str, references: Sequence[str]) -> float:
    """Whether the tag Solution holds equations, one fewer than numbers, that use each number once and give the target.

    Each equation may use results of earlier ones. Any solution is right, so that the references are not looked at.
    """
    solution = tagged(answer, "Solution")
    if solution is None:
        return 0.0
    left = list(numbers)
    lines = solution.split("\n")
    if len(lines) != len(numbers) - 1:
        return 0.0
    for line in lines:
        found = EQUATION.fullmatch(line)
        if not found:
            return 0.0
        first, sign, second, result = int(found[1]), found[2], int(found[3]), int(found[4])
        for used in (first, second):
            if used not in left:
                return 0.0
            left.remove(used)
        if _calculate(first, sign, second) != result:
            return 0.0
        left.append(result)
    return float(left == [target])


def same_trip(cities: Sequence[str], days: Sequence[int], answer: str, references: Sequence[str]) -> float:
    """Whether the plan in the tag Plan visits the cities in order, each for so many days.

    The plan names stays as `Day 1-4` and flights as `Day 4 ... from CITY to CITY`; arrival and departure both count.
    """
    plan = tagged(answer, "Plan")
    if plan is None:
        return 0.0
    flights = [found for line in plan.split("\n") if (found := FLIGHT.search(line))]
    stays = [found for line in plan.split("\n") if (found := STAY.search(line))]
    if not flights or not stays:
        return 0.0
    visited = [flights[0][2], *(flight[3] for flight in flights)]
    turns = [1, *(int(flight[1]) for flight in flights), int(stays[-1][2])]
    lengths = [stop - start + 1 for start, stop in pairwise(turns)]
    return float(visited == list(cities) and lengths == list(days))


def _beliefs(text: str) -> list[str]:
    lines = [line.strip()[1:] for line in text.splitlines() if line.strip().startswith("-")]
    plain = ["".join(c for c in line.lower() if c not in string.punctuation + "’") for line in lines]
    return [said for line in plain if (said := " ".join(FILLER.sub(" ", line).split()))]


def _rows(text: str) -> list[tuple[str, ...]]:
    """The rows below the heading; a row with another number of cells than the heading never matches."""
    lines = list(csv.reader(text.strip().split("\n"), delimiter="\t"))
    if len(lines) < 2:
        return []
    return [tuple(map(_cell, line)) if len(line) == len(lines[0]) else () for line in lines[1:]]


def _cell(text: str) -> str:
    text = "".join(letter for letter in text.lower() if letter not in string.punctuation)
    return "".join(ARTICLES.sub(" ", text).split())


def _calculate(first: int, sign: str, second: int) -> Fraction | None:
    if sign == "/":
        return Fraction(first, second) if second else None
    return Fraction({"+": first + second, "-": first - second, "*": first * second}[sign])
