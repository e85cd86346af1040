"""Suites read records in their data sets' form and tell right answers from wrong ones. The records are invented."""

import json
import re
from pathlib import Path

import pytest

from retention_gates.data.suites import SUITES, Record, SuiteExample, encode_questions, load_suite

FIXTURES = Path(__file__).parent.parent / "fixtures" / "suites"
FILES = sorted(path.stem for path in FIXTURES.glob("*.jsonl"))

# file -> for each question: right answers, and wrong ones or (answer, score)
ANSWERS = {
    "gsm8k__main": [
        (["So \\boxed{6}.", "The answer is 6.", "96 - 90 = 6"], ["\\boxed{16}", "", "six"]),
        (["\\boxed{4200}", "\\boxed{4,200}", "The answer is 4,200 crates, so \\boxed{4200.0}"], ["\\boxed{420}"]),
    ],
    "math500__default": [
        (["\\boxed{\\frac12}", "\\boxed{\\dfrac{1}{2}}", "\\fbox{0.5}", "\\boxed{1/2}"], ["\\boxed{2}", "\\boxed{"]),
        (["\\boxed{(0, 4)}", "\\boxed{\\left( 0,4 \\right)}"], ["\\boxed{(4,0)}", "(0,4) or \\boxed{4}"]),
    ],
    "aime24__default": [
        (["\\boxed{065}", "The answer is 65."], ["\\boxed{650}"]),
        (["\\boxed{9}", "9"], ["\\boxed{n}", ""]),
    ],
    "longbench__hotpotqa": [
        (["Kellwick", " the Kellwick.", "The town of Kellwick"], ["Orrin", ("in Kellwick town", 2 / 3)]),
        (["Tam", "the Tam"], [("the river Tam", 2 / 3)]),
    ],
    "longbench__trec": [
        (["city", "\ncity\nQuestion: x\nType: person"], [("person or city", 0.5), "person", ("city state", 0.5)]),
        (["city state"], ["city", ("a person in a city state", 0.5)]),
    ],
    "longbench__passage_retrieval_en": [(["Paragraph 2", "2"], [("Paragraph 2 or 1", 0.5), "Paragraph 12", "none"])],
    "longbench__multifieldqa_zh": [(["村子东边", "村子东边。"], [("东边", 2 / 3), "西"])],
    "longbench__lcc": [(["    return width * height\n\n"], [("```\n# area\nreturn width", 24 / 37), ""])],
    "longbench__gov_report": [(["The board spent more on dredging"], [("The board spent less.", 0.6), "Nothing"])],
    "longbench_v2__0shot": [
        (["The correct answer is (B)", "B", "(B) twice", "**B**"], ["The correct answer is (A)", "Both A and B", ""]),
        (["D. nobody", "Not A. The answer is D"], ["A good question", "C"]),
    ],
    "ruler__4096": [
        (["1111111 and 2222222"], [("1111111", 0.5), "3333333"]),
        (["ABCDE, FGHIJ"], [("abcde", 0.5), ""]),
        (["An owl", "the owl."], ["a wolf"]),
    ],
    "scbench__scbench_kv": [(["bb-22"], ["dd-44"]), (['"dd-44"'], ["dd 44"]), (["is ff-66."], [""])],
    "scbench__scbench_choice_eng": [(["B"], ["A"]), (["C. the gardener"], ["B"])],
    "scbench__scbench_mf": [(["9", " 9."], ["7 or 9", "nine"])],
    "scbench__scbench_vt": [(["XB XA"], [("XA", 0.5)])],
    "scbench__scbench_summary_with_needles": [
        (["It is a paper on tides."], [("A paper.", 0.5)]),
        (["40404."], ["4040"]),
    ],
    "longmemeval__oracle": [(["It is Biscuit!"], ["I don't know."]), (["You have 1."], ["2"])],
    "longproc__path_traversal_0.5k": [
        (
            ["<Route>\nFrom Ashby, take a road to Burl.\nFrom Burl, take a road to Cray.\n</Route>"],
            ["From Ashby, take a road to Burl.\nFrom Burl, take a road to Cray.", "<Route>From Ashby</Route>"],
        ),
        (["Sure. <Route>From Dale, take a road to Elm.</Route>"], ["<Route>From Elm, take a road to Dale.</Route>"]),
    ],
    "longproc__countdown_0.5k": [
        (
            ["<Solution>\n2*3=6\n6+4=10\n10*1=10\n</Solution>", "<Solution>3*4=12\n12/1=12\n12-2=10</Solution>"],
            [
                "2*3=6", "<Solution>\n2*3=6\n6+4=10\n</Solution>", "<Solution>\n2*3=7\n7+4=11\n11-1=10\n</Solution>",
                "<Solution>\n3*3=9\n9+1=10\n10/1=10\n</Solution>", "<Solution>\n4/0=1\n2*3=6\n6+4=10\n</Solution>",
                "<Solution>\n2+3=5\n5+4=9\n9*1=9\n</Solution>", "<Solution>\n2*3\n6+4=10\n10*1=10\n</Solution>",
            ],
        )
    ],  # fmt: skip
    "longproc__tom_tracking_0.5k": [
        (["- Step 1: cup on the shelf\n- Ida believes the cup is on shelf"], ["- cup: shelf", "", "- a\n- b\n- c"])
    ],
    "longproc__html_to_tsv_0.5k": [
        (
            ["```tsv\nname\theight\nOak\t12\nElm\t7\n```", "name\theight\nthe elm\t7\noak\t12"],
            [("name\theight\nOak\t12\nElm\t8", 0.5), ("```tsv\nname\theight\nOak\t12", 2 / 3), "Oak 12", "a\tb\nOak"],
        )
    ],
    "longproc__travel_planning_2k": [
        (
            ["<Plan>\nDay 1-4: Rome.\nDay 4: fly from Rome to Bern.\nDay 4-6: Bern.\n</Plan>"],
            [
                "<Plan>\nDay 1-3: Rome.\nDay 3: fly from Rome to Bern.\nDay 3-6: Bern.\n</Plan>",
                "<Plan>\nDay 1-4: Bern.\nDay 4: fly from Bern to Rome.\nDay 4-6: Rome.\n</Plan>", "<Plan>Rome</Plan>",
            ],
        )
    ],  # fmt: skip
    "kv_retrieval__75_keys": [
        (["ffff4-9d4e", 'It is "FFFF4-9d4e".'], ["ffff0-9d0e", "ffff4", ""]),
        (["ffff0-9d0e"], ["ffff4-9d4e"]),
    ],
    "infinitebench__passkey": [(["71717", " 71717."], ["7171", ""]), (["80080"], ["1 80080"])],
    "infinitebench__longbook_choice_eng": [(["C", "C. by the back door"], ["A"])],
    "infinitebench__math_calc": [(["[5, 7, 4]"], [("5, 7, 3", 2 / 3), "[7, 4]"])],
}  # fmt: skip


def load(file: str) -> list[SuiteExample]:
    return load_suite(file.replace("__", "/"), source=str(FIXTURES / f"{file}.jsonl"))


def test_every_suite_and_every_file_is_tested():
    assert set(FILES) == set(ANSWERS) and {file.split("__")[0] for file in FILES} == set(SUITES)


@pytest.mark.parametrize("file", FILES)
def test_right_answers_score_one_and_wrong_ones_less(file):
    examples = load(file)
    assert len(examples) == len(ANSWERS[file])
    for example, (right, wrong) in zip(examples, ANSWERS[file], strict=True):
        for answer in right:
            assert example.score(answer) == pytest.approx(1.0), answer
        for answer in wrong:
            text, score = (answer, 0.0) if isinstance(answer, str) else answer
            assert example.score(text) == pytest.approx(score), text
        assert example.messages[-1]["role"] == "user" and example.max_new_tokens >= 5


# file -> the fields that reading needs
FIELDS = {
    "gsm8k__main": ["question", "answer"],
    "math500__default": ["problem", "answer"],
    "aime24__default": ["Problem", "Answer"],
    "longbench__hotpotqa": ["context", "question", "answer_prefix", "answers", "max_new_tokens"],
    "longbench__trec": ["all_classes"],
    "longbench_v2__0shot": ["context", "question", "answer_prefix", "answer", "max_new_tokens"],
    "ruler__4096": ["context", "question", "answer_prefix", "answer", "task", "max_new_tokens"],
    "scbench__scbench_kv": ["context", "multi_turns"],
    "longmemeval__oracle": ["question", "answer", "question_type", "question_date", "haystack_sessions"],
    "longproc__path_traversal_0.5k": ["input_prompt", "reference_output"],
    "longproc__countdown_0.5k": ["metadata"],
    "kv_retrieval__75_keys": ["ordered_kv_records", "key", "value"],
    "infinitebench__passkey": ["context", "question", "answer_prefix", "answer", "max_new_tokens"],
}  # fmt: skip


@pytest.mark.parametrize(("file", "field"), [(file, field) for file, fields in FIELDS.items() for field in fields])
def test_a_field_that_is_missing_or_of_another_type_is_named(file, field):
    name, subset = file.split("__")
    first = json.loads((FIXTURES / f"{file}.jsonl").read_text(encoding="utf-8").splitlines()[0])
    for broken in ({key: value for key, value in first.items() if key != field}, first | {field: {"a": 1}}):
        with pytest.raises(ValueError, match=rf"{name}: .*{field}"):
            SUITES[name].read(Record(name, "record 0", broken), subset)


@pytest.mark.parametrize(
    ("file", "changes", "message"),
    [
        ("gsm8k__main", {"answer": "It is 6."}, "field 'answer' of record 0 has no answer behind '####'"),
        ("gsm8k__main", {"question": "  "}, "field 'question' of record 0 is blank"),
        ("aime24__default", {"Answer": "1000"}, "field 'Answer' of record 0 is '1000' and should be an integer of 0"),
        ("longbench__hotpotqa", {"answers": []}, "field 'answers' of record 0 holds no answer"),
        ("longbench__hotpotqa", {"max_new_tokens": 0}, "max_new_tokens=0 must be 1 or more"),
        ("longbench_v2__0shot", {"answer": "E"}, "field 'answer' of record 0 is 'E' and should be A, B, C or D"),
        ("ruler__4096", {"task": "niah"}, "field 'task' of record 0 is 'niah'; known are niah_single_1"),
        ("scbench__scbench_kv", {"multi_turns": []}, "field 'multi_turns' of record 0 must be a list of objects"),
        (
            "scbench__scbench_kv",
            {"multi_turns": [{"input": "a"}]},
            r"record 0, multi_turns\[0\] has no field 'answer'",
        ),
        (
            "scbench__scbench_choice_eng",
            {"multi_turns": [{"input": "a", "answer": "x", "options": ["a", "b", "c", "d"]}]},
            "field 'answer' .* is 'x', neither an option nor A to D",
        ),
        (
            "scbench__scbench_summary_with_needles",
            {"multi_turns": [{"input": "a", "answer": "x", "task": "chess"}]},
            "field 'task' .* is 'chess'; known: scbench_summary, scbench_passkey",
        ),
        ("kv_retrieval__75_keys", {"ordered_kv_records": [["a", 1]]}, "must be pairs of texts, the one of 'key'"),
        ("kv_retrieval__75_keys", {"value": "b"}, "must be pairs of texts, the one of 'key' and 'value' among them"),
        ("longmemeval__oracle", {"haystack_dates": ["x"]}, "1 'haystack_dates' and 2 'haystack_sessions'"),
        ("longmemeval__oracle", {"question_type": "chess"}, "field 'question_type' of record 0 is 'chess'"),
        (
            "longmemeval__oracle",
            {"haystack_sessions": ["x", "y"]},
            "field 'haystack_sessions' of record 0 holds no chat",
        ),
        ("longproc__countdown_0.5k", {"metadata": "nums"}, "field 'metadata' of record 0 is not JSON"),
        ("longproc__countdown_0.5k", {"metadata": '{"nums": []}'}, "record 0, metadata has no field 'target'"),
    ],
)
def test_a_malformed_record_is_named(file, changes, message):
    name, subset = file.split("__")
    first = json.loads((FIXTURES / f"{file}.jsonl").read_text(encoding="utf-8").splitlines()[0])
    with pytest.raises(ValueError, match=message):
        SUITES[name].read(Record(name, "record 0", first | changes), subset)


def test_an_answer_ends_at_a_stop_string():
    example = load("ruler__4096")[2]
    stopping = SuiteExample(**{**vars(example), "stop": ("\n", "Question:")})
    assert stopping.score(" owl\nQuestion: x") == 1.0 and stopping.score("Question: the owl?") == 0.0


def test_questions_of_one_context_follow_each_other_with_true_answers():
    first, second, other = load("scbench__scbench_kv")
    assert first.messages == second.messages[:1] and len(other.messages) == 1
    assert [m["role"] for m in second.messages] == ["user", "assistant", "user"]
    assert second.messages[1]["content"] == "bb-22" and "cc-33" in second.messages[0]["content"]
    assert second.messages[2]["content"] == 'Key: "cc-33"'


def test_sessions_are_told_in_the_order_of_their_dates():
    first, second = load("longmemeval__oracle")
    prompt = first.messages[0]["content"]
    assert (
        prompt.index("2024/05/01") < prompt.index("Biscuit") < prompt.index("2024/05/02") < prompt.index("plum cake")
    )
    assert "has_answer" not in prompt and prompt.endswith("What is my dog called?")
    assert (first.task, second.task) == ("longmemeval/single-session-user", "longmemeval/multi-session")


def test_loading_refuses_what_is_not_there(tmp_path):
    source = str(FIXTURES / "gsm8k__main.jsonl")
    assert len(load_suite("gsm8k", source=source, limit=1)) == 1
    for name, options, message in [
        ("gms8k", {}, "unknown suite 'gms8k'; allowed are aime24, gsm8k"),
        ("ruler/512", {}, "ruler has no subset '512'; choose 4096, 8192, 16384"),
        ("gsm8k", {"source": source, "limit": 0}, "limit=0 records"),
        ("gsm8k", {"source": "nowhere"}, "gsm8k: there is no file 'nowhere'; leave source out to load openai/gsm8k"),
        (
            "gsm8k",
            {"source": str(FIXTURES / "aime24__default.jsonl")},
            ":0 has no field 'answer'",
        ),
    ]:
        with pytest.raises(ValueError, match=message):
            load_suite(name, **options)


def test_what_is_not_on_the_hub_says_where_it_is():
    with pytest.raises(ValueError, match="kv_retrieval is not on the Hub: download it from https://github.com/nelson"):
        load_suite("kv_retrieval/140_keys")
    with pytest.raises(ValueError, match="there is no file 'nowhere'; it is at https://github.com/nelson"):
        load_suite("kv_retrieval", source="nowhere")


def test_the_hub_is_asked_for_the_right_data_set(monkeypatch):
    import datasets

    asked = []

    def load_dataset(*arguments, **options):
        asked.append((arguments, options))
        raise ConnectionError("no network")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    for name in ("gsm8k", "ruler/8192", "longmemeval/s"):
        with pytest.raises(ValueError, match="not be loaded .no network.; check the network, or give a local copy"):
            load_suite(name)
    assert asked == [
        (("openai/gsm8k", "main"), {"split": "test"}),
        (("simonjegou/ruler", "8192"), {"split": "test"}),
        (
            ("json",),
            {
                "data_files": "hf://datasets/xiaowu0162/longmemeval-cleaned/longmemeval_s_cleaned.json",
                "split": "train",
            },
        ),
    ]


def test_prompts_are_chats_or_plain_text(tokenizer):
    (question, *_) = load("ruler__4096")
    (chat,) = encode_questions([question], tokenizer)
    text = tokenizer.decode(chat.prompt_ids)
    assert text.startswith("<|im_start|>user\nNumbers are hidden") and text.endswith(
        "<|im_start|>assistant\n The numbers for wet-anvil are"
    )
    (plain,) = encode_questions([question], tokenizer, chat=False)
    text = tokenizer.decode(plain.prompt_ids)
    assert text.startswith("<|endoftext|>Numbers") and text.endswith("\n\n The numbers for wet-anvil are")
    assert (chat.task, chat.max_new_tokens, chat.cut) == ("ruler/niah_multivalue", 128, 0)
    assert chat.score("1111111") == 0.5


def test_of_a_long_prompt_the_middle_is_left_out(tokenizer):
    questions = load("ruler__4096")
    whole = encode_questions(questions, tokenizer)[0]
    short = encode_questions(questions, tokenizer, longest_prompt=31)[0]
    assert short.cut == len(whole.prompt_ids) - 31 > 0 and len(short.prompt_ids) == 31
    assert short.prompt_ids == whole.prompt_ids[:15] + whole.prompt_ids[-16:]
    assert encode_questions(questions, tokenizer, longest_prompt=10**6)[0] == whole


def test_encoding_refuses_a_chat_without_template(tokenizer, monkeypatch):
    monkeypatch.setattr(tokenizer, "chat_template", None)
    questions = load("ruler__4096")
    assert tokenizer.decode(encode_questions(questions, tokenizer)[0].prompt_ids).startswith("<|endoftext|>")
    with pytest.raises(ValueError, match="has no chat template; use chat=False"):
        encode_questions(questions, tokenizer, chat=True)
    with pytest.raises(ValueError, match="longest_prompt=1 tokens"):
        encode_questions(questions, tokenizer, longest_prompt=1)


def test_a_scorer_without_references_is_refused():
    from retention_gates.data.suites import math_answers, scoring

    for scorer in (scoring.word_f1, scoring.contains_any, scoring.number_sequence, math_answers.integer_answer):
        with pytest.raises(ValueError, match="a scorer needs a list of one or more reference answers"):
            scorer("an answer", [])
        with pytest.raises(ValueError, match="a scorer needs a list"):
            scorer("an answer", "text")
    with pytest.raises(ValueError, match="no reference answer"):
        SuiteExample("t", ({"role": "user", "content": "q"},), (), 1, scoring.word_f1)


def test_rouge_l_is_that_of_the_longest_common_subsequence():
    from retention_gates.data.suites.scoring import rouge_l

    # a case by hand: "police the gunman" against "police killed the gunman": 3 in order, of 3 and of 4
    assert rouge_l("police the gunman", ["police killed the gunman"]) == pytest.approx(2 * 3 / 7)
    assert rouge_l("the gunman police", ["police killed the gunman"]) == pytest.approx(2 * 2 / 7)


def test_the_suite_that_contributing_shows(tmp_path):
    text = (Path(__file__).parents[2] / "CONTRIBUTING.md").read_text(encoding="utf-8")
    code = re.search(r"```python\n(.*?)```", text.split("## A new suite")[1].split("\n## ")[0], flags=re.DOTALL)
    assert code is not None
    names: dict = {}
    exec(code[1], names)
    file = tmp_path / "capitals.jsonl"
    file.write_text(json.dumps({"question": "Which city is it?", "answers": ["Paris"]}) + "\n", encoding="utf-8")
    (example,) = names["CAPITALS"].load(source=str(file))
    assert (example.score("Paris"), example.score("Rome")) == (1.0, 0.0)
