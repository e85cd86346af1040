"""The report on written answers: what it says of invented scores, and a page that is whole and safe."""

import re
from html.parser import HTMLParser

import pytest

from retention_gates.data.suites import EncodedQuestion, SuiteExample
from retention_gates.data.suites.scoring import exact_match
from retention_gates.recipes.report import answer_tables, answers_page
from retention_gates.trainers.evaluation.paired_statistics import aggregate, mean_over_samples, sign_test

ROWS = 20
# contender -> the questions that it answers right
RIGHT = {
    ("full", None, None): set(range(12)),
    ("retention", 8, "calibrated"): set(range(2, 13)),  # without 0, 1; with 12
    ("retention", 8, "uniform"): set(range(4)),
    ("streaming_llm", 8, "uniform"): {0, 2, 3, 19},
    ("h2o", 8, "uniform"): set(),
    ("retention", 16, "calibrated"): set(range(12)),
    ("retention", 16, "uniform"): set(range(11)),
    ("streaming_llm", 16, "uniform"): set(range(14)),
    ("h2o", 16, "uniform"): {1},
}


def records(task="gsm8k", right=RIGHT):
    return [
        {"task": task, "row": row, "policy": policy, "memory_size": size, "budgets": budgets}
        | {"score": float(row in own), "answer": f"<b>{policy}</b> says {row}", "new_tokens": 10 + row}
        | {"is_cut": row >= 15, "loops": row >= 18}
        for row in range(ROWS)
        for (policy, size, budgets), own in right.items()
    ]


def questions(task="gsm8k"):
    return {
        (task, row): EncodedQuestion(
            [5], SuiteExample(task, ({"role": "user", "content": f"<i>{row}</i>?"},), (f"a{row}",), 30, exact_match)
        )
        for row in range(ROWS)
    }


@pytest.fixture(scope="module")
def panels():
    return answer_tables.panels_of(aggregate(records()))


def test_the_findings_say_who_is_ahead_and_whether_that_may_be_chance(panels):
    full, small, large = answer_tables.findings(panels)
    assert full == "gsm8k: the full cache scores 0.600 ± 0.112 on 20 questions."
    assert (
        "At 8 entries per head the best gates (gates, calibrated) score 0.550 ± 0.114, 92% of the full cache's"
        in small
    )
    assert "ahead of the best rival, StreamingLLM, with 0.200 ± 0.092" in small
    wins, losses = len(set(range(2, 13)) - {2, 3}), len({0, 19})
    p = sign_test(wins, losses)
    assert (
        f"better on {wins} questions, worse on {losses}, p = {p:.2g}, which may be chance." in small and 0.05 < p < 0.1
    )
    assert "behind the best rival, StreamingLLM, with 0.700" in large and "which may be chance" in large
    alone = answer_tables.panels_of([s for s in aggregate(records()) if s.policy in ("full", "h2o")])
    assert answer_tables.findings(alone)[1:] == [
        "At 8 entries per head the best is H2O, 0.000 ± 0.000.",
        "At 16 entries per head the best is H2O, 0.050 ± 0.050.",
    ]


def test_paired_tests_are_mcnemars(panels):
    heads, rows = answer_tables.paired_tests(panels["gsm8k"])
    assert all(len(row) == len(heads) for row in rows) and len(rows) == 8
    by_name = {(row[0], row[1]): row[2:] for row in rows}
    gates = by_name["gates, calibrated", "8"]
    assert gates[:3] == ["0.550 ± 0.114", "1 / 2", "1"] and gates[4:] == ["", "", ""]
    stream = by_name["StreamingLLM", "8"]
    assert stream[1] == "1 / 9" and float(stream[2]) == pytest.approx(
        sign_test(1, 9), rel=0.05
    )  # printed with two digits
    assert stream[4] == "9 / 2" and float(stream[5]) == pytest.approx(
        sign_test(9, 2), rel=0.05
    )  # printed with two digits
    for column in (2, 5):
        pairs = [(float(row[column]), float(row[column + 1])) for row in by_name.values() if row[column]]
        assert all(p <= corrected <= 1 for p, corrected in pairs) and any(p < corrected for p, corrected in pairs)


def test_lengths_tell_what_was_cut_and_loops():
    heads, rows = answer_tables.lengths(records())
    assert [row[1] for row in rows] == ["all"] + ["8"] * 4 + ["16"] * 4
    assert rows[0] == ["full cache", "all", "20", "20", "29", "25.0%", "10.0%", f"{12 / 15:.3f}"]
    assert len(heads) == len(rows[0])
    assert answer_tables.lengths([{"task": "x", "score": 1.0, "answer": "a"}])[1] == []
    cut = [record | {"is_cut": True} for record in records()]
    assert answer_tables.lengths(cut)[1][0][-1] == ""


def test_examples_are_questions_on_which_they_differ(panels):
    found = answer_tables.examples(panels, records(), questions())
    assert {example.memory_size for example in found} == {8}
    assert [example.row for example in found] == [0, 1, 4, 5, 12, 19]
    first = found[0]
    assert [(said.name, said.score) for said in first.said] == [
        ("full cache", 1.0), ("gates, calibrated", 0.0), ("StreamingLLM", 1.0),
    ]  # fmt: skip
    assert first.question == "<i>0</i>?" and first.expected == "a0" and first.said[0].remark == "10 tokens"
    assert found[-1].said[2].remark == "29 tokens, cut, loops"
    assert answer_tables.examples(panels, records(), {}) == []


class Whole(HTMLParser):
    """Notes what is open; an end tag must close what was opened last."""

    def __init__(self):
        super().__init__()
        self.open, self.seen = [], set()

    def handle_starttag(self, tag, attributes):
        self.seen.add(tag)
        assert not any(name in ("src", "href") and not value.startswith(("data:", "#")) for name, value in attributes)
        if tag not in ("meta", "br", "img", "link", "path", "use", "rect"):
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.seen.add(tag)

    def handle_endtag(self, tag):
        if tag not in ("path", "use", "rect"):
            assert self.open.pop() == tag


@pytest.mark.parametrize("has_matplotlib", [True, False])
def test_the_page_is_whole_and_says_what_answers_say(monkeypatch, has_matplotlib):
    if not has_matplotlib:
        monkeypatch.setattr(answers_page, "find_spec", lambda name: None)
    both = records() + records("math500")
    page = answers_page.answers_page(
        "A <model>", ["model: `x`"], aggregate(both), both, questions() | questions("math500")
    )
    whole = Whole()
    whole.feed(page)
    assert whole.open == [] and ("svg" in whole.seen) == has_matplotlib
    assert ("matplotlib is not installed" in page) != has_matplotlib
    assert (
        "A &lt;model&gt;" in page
        and "&lt;b&gt;full&lt;/b&gt; says 0" in page
        and "<b>" not in page
        and "<i>" not in page
    )
    assert page.count("<h3>gsm8k</h3>") == page.count("<h3>math500</h3>") == 1
    assert (
        len(re.findall("Paired tests</summary>", page)) == 2 == page.count("Lengths, cut answers and loops</summary>")
    )


def test_means_of_samples_are_what_is_reported():
    drawn = [record | {"sample": n, "score": float(n == 0)} for record in records() for n in range(4)]
    summaries = aggregate(mean_over_samples(drawn))
    page = answers_page.answers_page("x", [], summaries, drawn, questions())
    assert "the full cache scores 0.250 ± 0.000 on 20 questions" in page
