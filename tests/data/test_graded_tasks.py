"""Tasks whose answer has parts or is collected from several places, and the settings that make tasks harder."""

import re

import pytest

from retention_gates.data.tasks import build_task
from retention_gates.data.tasks.pitfalls import leaks
from retention_gates.data.tasks.words import ADJECTIVES, NOUNS

LENGTH = 900


def make(name, tokenizer, documents, count=8, length=LENGTH, seed=0, split="test"):
    return build_task(name).examples(tokenizer, documents, count, length, seed, split)


def part_texts(tokenizer, example):
    return {name: tokenizer.decode(example.answer_ids[slice(*span)]) for name, span in example.parts.items()}


def test_settings_come_with_the_name():
    task = build_task("passkey:needles=3,depth=0.25")
    assert (task.needles, task.depth, task.name) == (3, 0.25, "passkey:needles=3,depth=0.25")
    assert build_task(build_task("pitfalls:defence=last").name) == build_task("pitfalls:defence=last")
    assert build_task("passkey:needles=1") == build_task("passkey") and build_task("passkey").name == "passkey"
    assert build_task("long_generation:distance=2048").distance == 2048


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("passkey:needle=2", "'needle=2', which should be NAME=VALUE .*: needles, depth"),
        ("passkey:needles=2,needles=3", "'needles=3', which should be"),
        ("passkey:needles", "'needles', which should be"),
        ("passkey:needles=two", "needles=two, which is not a number"),
        ("passkey:needles=2.5", "needles=2.5, which is not a number of the right kind"),
        ("passkey:needles=4", "passkey: needles=4 must lie between 1 and 3"),
        ("code_lookup:depth=1.5", "code_lookup: depth=1.5 must lie between 0 and 1"),
        ("multi_key:keys=100", "multi_key: keys=100 must lie between 2 and 64"),
        ("common_words:repeats=3,rare_repeats=3", "rare_repeats=3 must lie between 1 and 2"),
        ("pitfalls:defence=middle", "defence='middle'; choose first, last, any"),
        ("long_generation:distance=-1", "distance=-1 must lie between 0"),
    ],
)
def test_wrong_settings_are_named(name, message):
    with pytest.raises(ValueError, match=message):
        build_task(name)


@pytest.mark.parametrize("kind", ["passage_repeat", "sentence_recall", "passkey", "code_lookup", "multi_key"])
def test_depth_says_where_the_answer_stands(kind, tokenizer, token_documents):
    def share(depth):
        examples = make(f"{kind}:depth={depth}", tokenizer, token_documents, count=6)
        places = []
        for example in examples:
            ids, row = example.answer_ids, example.prompt_ids
            found = [i for i in range(len(row) - len(ids) + 1) if row[i : i + len(ids)] == ids]
            places.append(found[-1] / len(row))
        return sum(places) / len(places)

    early, middle, late = share(0.1), share(0.5), share(0.9)
    assert 0.05 < early < 0.4 < middle < 0.65 < late < 0.95


def test_several_pass_keys_are_all_asked_for(tokenizer, token_documents):
    for example in make("passkey:needles=3", tokenizer, token_documents):
        text = tokenizer.decode(example.prompt_ids)
        told = dict(re.findall(r"The pass key number (\d) is (\d{5})\. Remember it\.", text))
        assert part_texts(tokenizer, example) == {f"key {number}": code for number, code in sorted(told.items())}
        whole = tokenizer.decode(example.prompt_ids + example.answer_ids)
        assert whole.endswith("The pass key number 1 is {}. The pass key number 2 is {}. The pass key number 3 is {}"
                              .format(*example.meta["codes"]))  # fmt: skip


def test_keys_resemble_each_other(tokenizer, token_documents):
    for example in make("multi_key:keys=9", tokenizer, token_documents):
        text = tokenizer.decode(example.prompt_ids)
        told = dict(re.findall(r"magic number of the (\w+ \w+) is (\d{5})\.", text))
        asked = re.search(r"magic number of the (\w+ \w+) is $", text)[1]
        assert len(told) == 9 and told[asked] == tokenizer.decode(example.answer_ids)
        assert len({key.split()[0] for key in told}) == len({key.split()[1] for key in told}) == 3


def test_all_values_are_asked_for_in_order(tokenizer, token_documents):
    for example in make("multi_value:values=5", tokenizer, token_documents):
        told = re.findall(
            r"One of the magic numbers of the \w+ \w+ is (\d{5})\.", tokenizer.decode(example.prompt_ids)
        )
        assert len(told) == 5 and tokenizer.decode(example.answer_ids) == ", ".join(told)


def test_variables_are_followed_from_chain_to_chain(tokenizer, token_documents):
    for example in make("variable_tracking:hops=3,chains=2", tokenizer, token_documents):
        text = tokenizer.decode(example.prompt_ids)
        values: dict[str, str] = {}
        for name, source in re.findall(r"VAR ([A-Z]{5}) = (?:VAR )?(\w+)", text):
            values[name] = values.get(source, source)
        asked = re.search(r"variables that hold (\d{5}), in the order", text)[1]
        holding = [name for name, value in values.items() if value == asked]
        assert len(values) == 8 and len(holding) == 4
        assert tokenizer.decode(example.answer_ids).strip() == ", ".join(holding)


def test_common_words_come_up_most_often(tokenizer, token_documents):
    for split in ("train", "test"):
        for example in make("common_words", tokenizer, token_documents, split=split):
            listed = re.findall(r" ([a-z]+),", tokenizer.decode(example.prompt_ids).rsplit("\n\n", 1)[0])
            answer = tokenizer.decode(example.answer_ids).strip().split(", ")
            counts = {word: listed.count(word) for word in listed}
            assert [counts[word] for word in answer] == [12] * 3
            assert sorted(answer, key=listed.index) == answer
            assert max(n for word, n in counts.items() if word not in answer) == 2


def test_a_long_text_keeps_to_its_plan(tokenizer, token_documents):
    for example in make("long_generation:distance=300", tokenizer, token_documents):
        plan = tokenizer.decode(example.prompt_ids)
        titles = re.findall(r"Section \d: (The \w+ \w+)", plan)
        texts = part_texts(tokenizer, example)
        assert [text.strip() for text in texts.values()] == titles == example.meta["titles"]
        assert plan.endswith("Section 1:")
        last_title = (
            len(example.prompt_ids) - 300 - len(tokenizer.encode("\n\n")) - len(tokenizer.encode("\n\nSection 1:"))
        )
        assert tokenizer.decode(example.prompt_ids[:last_title]).endswith(titles[-1])
        starts = [start for start, _ in example.parts.values()]
        assert starts == sorted(starts) and starts[-1] > 150


def test_turns_ask_for_what_was_told_before_the_first(tokenizer, token_documents):
    for example in make("multi_turn:turns=4", tokenizer, token_documents):
        told = dict(re.findall(r"number of (\w+) is (\d{5})\.", tokenizer.decode(example.prompt_ids)))
        whole = tokenizer.decode(example.prompt_ids + example.answer_ids)
        asked = re.findall(r"Answer: The telephone number of (\w+) is (\d{5})", whole)
        assert len(told) == 4 and dict(asked) == told
        assert list(part_texts(tokenizer, example).values()) == [code for _, code in asked]


def test_pitfalls_score_each_instruction(tokenizer, token_documents):
    orders = set()
    for example in make("pitfalls", tokenizer, token_documents):
        ((start, stop),) = example.pinned
        system = tokenizer.decode(example.prompt_ids[start:stop])
        said = {name: text.strip() for name, text in part_texts(tokenizer, example).items()}
        assert list(said) == ["greeting", "name", "number", "motto", "defence", "secret"]
        assert f"Begin every reply with the greeting: {said['greeting']}." in system
        assert f"dear {said['name']}." in system and f"which is {said['number']}." in system
        assert f"the motto: {said['motto']}." in system and f"the only answer is: {said['defence']}." in system
        assert f"The secret code is {said['secret']}." in system and system.endswith("\n\n")
        numbered = re.findall(r"\n(\d)\. ", system)
        assert numbered == list("123456")
        orders.add(tuple(example.meta["order"]))
    assert len(orders) > 4


@pytest.mark.parametrize(("defence", "place"), [("first", 0), ("last", -1)])
def test_the_defence_can_stand_first_or_last(defence, place, tokenizer, token_documents):
    for example in make(f"pitfalls:defence={defence},instructions=2", tokenizer, token_documents):
        system = tokenizer.decode(example.prompt_ids[: example.pinned[0][1]])
        lines = re.findall(r"\n\d\. (.*)", system)
        assert len(lines) == 4 and lines[place].startswith("Tell nobody")
        assert example.meta["order"][place] == "defence"


def test_a_secret_leaks_where_it_is_known_and_the_defence_is_not():
    names = {"policy": "full", "memory_size": None, "budgets": None}
    outcomes = [(1.0, 1.0), (0.0, 1.0), (1.0, 0.0), (0.0, 0.0)]  # the defence and the secret, told or not
    records = [
        {"task": f"pitfalls:defence=first/{part}", "row": row, **names, "token_accuracy": 0.5, "exact": outcome[index]}
        for row, outcome in enumerate(outcomes)
        for index, part in enumerate(("defence", "secret"))
    ]
    found = leaks(records)
    assert {record["task"] for record in found} == {"pitfalls:defence=first/kept secret"}
    assert [record["exact"] for record in found] == [1.0, 0.0, 1.0, 1.0]


def test_train_and_test_share_no_words():
    for words in (ADJECTIVES, NOUNS):
        assert not set(words["train"]) & set(words["test"])
        assert all(len(words[split]) == len(set(words[split])) >= 12 for split in words)
