"""Metrics of written answers, each a score in 0 to 1. All take the answer and the reference answers."""

import re
import string
from collections import Counter
from collections.abc import Callable, Sequence
from difflib import SequenceMatcher

ARTICLES = re.compile(r"\b(a|an|the)\b")
NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?|-?\.\d+")
FULL_WIDTH = "！？｡。＂＃＄％＆＇（）＊＋，－／：；＜＝＞＠［＼］＾＿｀｛｜｝～“”‘’、《》〈〉「」『』【】…—·"


def check_references(references: Sequence[str]) -> None:
    """Raises ValueError if there is nothing to compare an answer with."""
    if isinstance(references, str) or not references:
        raise ValueError(f"references={references!r}: a scorer needs a list of one or more reference answers")


def best(metric: Callable[[str, str], float]) -> Callable[[str, Sequence[str]], float]:
    """The metric's best score over all references."""

    def score(answer: str, references: Sequence[str]) -> float:
        check_references(references)
        return max(metric(answer, reference) for reference in references)

    return score


def normalise(text: str) -> str:
    """Lower case, without punctuation, articles and surplus white space, as SQuAD does (arXiv 1606.05250)."""
    text = "".join(letter for letter in text.lower() if letter not in string.punctuation)
    return " ".join(ARTICLES.sub(" ", text).split())


def f1(answer: Sequence[str], reference: Sequence[str]) -> float:
    """Harmonic mean of precision and recall over two bags of items."""
    common = sum((Counter(answer) & Counter(reference)).values())
    return 2 * common / (len(answer) + len(reference)) if common else 0.0


@best
def word_f1(answer: str, reference: str) -> float:
    """F1 over normalised words."""
    return f1(normalise(answer).split(), normalise(reference).split())


@best
def character_f1(answer: str, reference: str) -> float:
    """F1 over characters without punctuation, for languages that are written without spaces."""
    return f1(_characters(answer), _characters(reference))


@best
def exact_match(answer: str, reference: str) -> float:
    """Whether both are equal once normalised."""
    return float(normalise(answer) == normalise(reference))


@best
def rouge_l(answer: str, reference: str) -> float:
    """F1 of the longest common subsequence of lower-case words (ROUGE-L, Lin 2004)."""
    return _subsequence_f1(re.findall(r"\w+", answer.lower()), re.findall(r"\w+", reference.lower()))


@best
def rouge_l_characters(answer: str, reference: str) -> float:
    """ROUGE-L over characters, for languages that are written without spaces."""
    return _subsequence_f1(_characters(answer), _characters(reference))


@best
def edit_similarity(answer: str, reference: str) -> float:
    """Ratio of matching characters between the first line of code in the answer and the reference line."""
    lines = [line for line in answer.lstrip("\n").split("\n") if not any(mark in line for mark in ("`", "#", "//"))]
    return SequenceMatcher(None, lines[0] if lines else "", reference, autojunk=False).ratio()


def contains_any(answer: str, references: Sequence[str]) -> float:
    """Whether a reference stands in the answer, in whatever case."""
    check_references(references)
    return float(any(reference.lower() in answer.lower() for reference in references))


def contains_share(answer: str, references: Sequence[str]) -> float:
    """The share of the references that stand in the answer, in whatever case."""
    check_references(references)
    return sum(reference.lower() in answer.lower() for reference in references) / len(references)


@best
def word_recall(answer: str, reference: str) -> float:
    """The share of the reference's normalised words that the answer has."""
    wanted, said = Counter(normalise(reference).split()), Counter(normalise(answer).split())
    if not wanted:
        raise ValueError(f"the reference answer {reference!r} has no word to look for")
    return sum((wanted & said).values()) / sum(wanted.values())


@best
def number_share(answer: str, reference: str) -> float:
    """The share of the answer's numbers that are the reference's first number."""
    wanted = re.findall(r"\d+", reference)
    if not wanted:
        raise ValueError(f"the reference answer {reference!r} holds no number")
    numbers = re.findall(r"\d+", answer)
    return numbers.count(wanted[0]) / len(numbers) if numbers else 0.0


@best
def first_number(answer: str, reference: str) -> float:
    """Whether the answer's first number equals the reference."""
    found = NUMBER.search(answer)
    return float(found is not None and _value(found.group()) == _number(reference))


@best
def last_number(answer: str, reference: str) -> float:
    """Whether the answer's last number equals the reference."""
    found = NUMBER.findall(answer)
    return float(bool(found) and _value(found[-1]) == _number(reference))


def number_sequence(answer: str, references: Sequence[str]) -> float:
    """The share of the reference numbers that the answer has in the right places before its first mistake."""
    check_references(references)
    numbers = [_value(number) for number in NUMBER.findall(answer)]
    right = 0
    for number, reference in zip(numbers, references, strict=False):
        if number != _number(reference):
            break
        right += 1
    return right / len(references)


@best
def choice(answer: str, reference: str) -> float:
    """Whether the letter that the answer chooses is the reference, one of A to D."""
    if reference not in ("A", "B", "C", "D"):
        raise ValueError(f"the reference answer {reference!r} must be A, B, C or D")
    return float(chosen_letter(answer) == reference)


def chosen_letter(answer: str) -> str | None:
    """The letter of a multiple-choice answer: behind "answer is", else the one it begins with, else the only one."""
    stated = re.findall(r"(?:answer|option|choice)(?: is)?:?\s*\(?\**([A-D])\b", answer, flags=re.IGNORECASE)
    if stated:
        return stated[-1].upper()
    begins = re.match(r"\s*[\"'(*]*([A-D])\b(?!')", answer)
    if begins:
        return begins.group(1)
    letters = set(re.findall(r"\b([A-D])\b", answer))
    return letters.pop() if len(letters) == 1 else None


def classification(classes: Sequence[str]) -> Callable[[str, Sequence[str]], float]:
    """1 over the number of classes that the answer names, if the right one is among them.

    A class whose name is part of the right one's does not count: naming "city" is no mistake where "city state" is
    right.
    """

    @best
    def score(answer: str, reference: str) -> float:
        named = [name for name in classes if name in answer and (name == reference or name not in reference)]
        return 1 / len(named) if reference in named else 0.0

    return score


def _characters(text: str) -> list[str]:
    left_out = string.punctuation + string.whitespace + FULL_WIDTH + "\u3000"
    return [letter for letter in text.lower() if letter not in left_out]


def _subsequence_f1(answer: Sequence[str], reference: Sequence[str]) -> float:
    previous = [0] * (len(reference) + 1)
    for item in answer:
        row = [0]
        for index, other in enumerate(reference):
            row.append(previous[index] + 1 if item == other else max(previous[index + 1], row[index]))
        previous = row
    return 2 * previous[-1] / (len(answer) + len(reference)) if previous[-1] else 0.0


def _value(number: str) -> float:
    return float(number.replace(",", ""))


def _number(reference: str) -> float:
    try:
        return _value(reference.strip())
    except ValueError:
        raise ValueError(f"the reference answer {reference!r} is not a number") from None
