"""Answers in mathematics are compared by math-verify, whole numbers as such."""

import threading

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from retention_gates.data.suites import load_suite, math_answers
from retention_gates.data.suites.math_answers import math_answer, same


@pytest.mark.parametrize(
    ("answer", "reference", "expected"),
    [
        ("18", "18", True),
        ("1,234", "1234", True),
        ("18.00", "18", True),
        (r"18 \text{ dollars}", "18", True),
        (r"\$18", "18", True),
        (r"50\%", "50", True),
        (r"x=5", "5", True),
        (r"\frac{3}{6}", r"\frac12", True),
        (r"0.5", r"\frac{1}{2}", True),
        (r"1+x", "x+1", True),
        (r"2\sqrt{2}", r"\sqrt{8}", True),
        (r"\left( 3, \frac{\pi}{2} \right)", r"(3,\pi/2)", True),
        (r"2,1", "1,2", True),
        (r"\text{Evelyn}", r"\text{Evelyn}", True),
        (r"6-5i", "6 - 5i", True),
        ("19", "18", False),
        (r"\frac{1}{3}", r"\frac12", False),
        (r"(2,1)", "(1,2)", False),
        ("x", "18", False),
        (r"\frac{", "18", False),
    ],
)
def test_what_is_the_same(answer, reference, expected):
    assert same(answer, reference) == expected
    assert math_answer(rf"\boxed{{7}}, no: \boxed{{{answer}}}", [reference]) == float(expected), "the last box counts"


@settings(max_examples=60, deadline=None)
@given(one=st.integers(-(10**9), 10**9), other=st.integers(-20, 20), grouped=st.booleans())
def test_whole_numbers_are_compared_as_math_verify_does(one, other, grouped):
    for number in (one, one + other, other):
        said = f"{number:,}" if grouped else str(number)
        assert same(said, str(one)) == (number == one) == math_answers._verified(said, str(one))


def test_a_number_that_nobody_can_compute_is_wrong(monkeypatch):
    monkeypatch.setattr(math_answers, "SECONDS", 1)
    assert math_answer(r"\boxed{9^{9^{9^{9}}}}", ["8"]) == 0.0


def test_another_thread_compares_too():
    found = []
    thread = threading.Thread(target=lambda: found.append(same(r"\frac{4}{6}", r"\frac{2}{3}")))
    thread.start()
    thread.join()
    assert found == [True]


@pytest.mark.parametrize("suite", ["gsm8k", "math500", "aime24"])
def test_without_math_verify_nothing_is_asked(suite, monkeypatch):
    monkeypatch.setattr(math_answers, "INSTALLED", False)
    fixtures = __file__.replace("data/test_math_answers.py", "fixtures/suites")
    name = {"gsm8k": "gsm8k__main"}.get(suite, f"{suite}__default")
    with pytest.raises(ValueError, match=f"{suite}: answers are compared by the package math-verify: pip install"):
        load_suite(suite, source=f"{fixtures}/{name}.jsonl")
