import re

import numpy as np
import pytest

from retention_gates.data.tasks import TASKS, Filler, build_task
from retention_gates.data.tasks.base import draw_code
from retention_gates.data.tasks.code_lookup import NAMES
from retention_gates.data.tokens import TokenDocument, document_prefix

NAMES_OF_TASKS = sorted(TASKS)
LENGTH = 700


def make(name, tokenizer, documents, count=12, length=LENGTH, seed=0, split="test"):
    return build_task(name).examples(tokenizer, documents, count, length, seed, split)


def test_the_tasks_are_those_that_are_documented():
    assert NAMES_OF_TASKS == [
        "code_lookup", "common_words", "long_generation", "multi_key", "multi_turn", "multi_value", "passage_repeat",
        "passkey", "pitfalls", "sentence_recall", "variable_tracking",
    ]  # fmt: skip


@pytest.mark.parametrize("name", NAMES_OF_TASKS)
def test_examples_have_one_length_and_follow_from_the_seed(name, tokenizer, token_documents):
    for length in (LENGTH, LENGTH + 1, 933):
        examples = make(name, tokenizer, token_documents, length=length)
        assert {len(e.prompt_ids) + len(e.answer_ids) for e in examples} == {length}
        assert all(e.prompt_ids[:1] == document_prefix(tokenizer) and e.answer_ids for e in examples)
    examples = make(name, tokenizer, token_documents)
    assert examples[:5] == make(name, tokenizer, token_documents, count=5)
    assert len({tuple(e.prompt_ids) for e in examples}) == len(examples)
    assert not any(a == b for a, b in zip(examples, make(name, tokenizer, token_documents, seed=1), strict=True))
    assert not any(
        a == b for a, b in zip(examples, make(name, tokenizer, token_documents, split="train"), strict=True)
    )


@pytest.mark.parametrize("name", NAMES_OF_TASKS)
def test_the_answer_stands_in_the_prompt_token_for_token_well_before_its_end(name, tokenizer, token_documents):
    if name in ("multi_value", "variable_tracking", "common_words"):
        pytest.skip("collects an answer from several places, see test_graded_tasks.py")
    for example in make(name, tokenizer, token_documents, count=30):
        for start, stop in example.parts.values() or [(0, len(example.answer_ids))]:
            found = places_of(example.answer_ids[start:stop], example.prompt_ids)
            assert found and found[-1] + stop - start < len(example.prompt_ids) - 64


def places_of(ids, row):
    return [start for start in range(len(row) - len(ids) + 1) if row[start : start + len(ids)] == ids]


def test_a_repeated_passage_continues_its_cue(tokenizer, token_documents):
    for example in make("passage_repeat", tokenizer, token_documents):
        start = example.meta["passage_start"]
        assert example.prompt_ids[start : start + 96] == example.prompt_ids[-16:] + example.answer_ids
        assert len(example.answer_ids) == 80


def test_a_recalled_sentence_is_a_whole_one(tokenizer, token_documents):
    for example in make("sentence_recall", tokenizer, token_documents):
        sentence, text = example.meta["sentence"], tokenizer.decode(example.prompt_ids)
        context, cue = text.rsplit("\n\n", 1)
        assert sentence in context and sentence == cue + tokenizer.decode(example.answer_ids)
        assert len(cue.split()) == 18 and sentence[0].isupper() and sentence.endswith(".")
        ids = tokenizer.encode(cue) + example.answer_ids
        assert example.prompt_ids[example.meta["position"] :][: len(ids)] == ids


def test_a_looked_up_code_belongs_to_the_name_asked(tokenizer, token_documents):
    for split in ("train", "test"):
        for example in make("code_lookup", tokenizer, token_documents, split=split):
            text = tokenizer.decode(example.prompt_ids)
            statements = dict(re.findall(r"number of (\w+) is (\d{5})\.", text))
            name = re.search(r"number of (\w+) is $", text)[1]
            assert len(statements) == 4 and set(statements) <= set(NAMES[split])
            assert statements[name] == tokenizer.decode(example.answer_ids) == example.meta["code"]
            assert len(example.answer_ids) == 5  # no space among the scored tokens


def test_a_training_row_of_code_lookup_asks_for_all(tokenizer, token_documents):
    row = build_task("code_lookup").training_row(Filler(tokenizer, token_documents), LENGTH, seed=3, index=5)
    assert row["input_ids"].shape == (LENGTH,) and row["position_ids"].tolist() == list(range(LENGTH))
    assert row["labels"].tolist() == [-100, *row["input_ids"].tolist()[1:]]
    pairs = re.findall(r"number of (\w+) is (\d{5})\.", tokenizer.decode(row["input_ids"]))
    assert (
        len(pairs) == 8
        and sorted(pairs[:4]) == sorted(pairs[4:])
        and {name for name, _ in pairs} <= set(NAMES["train"])
    )


def test_train_and_test_share_no_names_and_codes():
    assert not set(NAMES["train"]) & set(NAMES["test"])
    rng = np.random.default_rng(0)
    train, test = ({draw_code(rng, split) for _ in range(5000)} for split in ("train", "test"))
    assert not train & test and all(len(code) == 5 for code in train | test)
    assert {code[0] for code in test} == {code[4] for code in train} == set("0123456789")


def test_the_pass_key_is_asked_after_noise(tokenizer, token_documents):
    for example in make("passkey", tokenizer, token_documents):
        text, (code,) = tokenizer.decode(example.prompt_ids), example.meta["codes"]
        assert f" The pass key is {code}. Remember it. {code} is the pass key." in text
        assert text.endswith("What is the pass key? The pass key is ")
        assert tokenizer.decode(example.answer_ids) == code


def test_short_documents_are_laid_end_to_end(tokenizer):
    documents = [TokenDocument(str(i), np.arange(i * 10, i * 10 + 10, dtype=np.int32)) for i in range(30)]
    window = Filler(tokenizer, documents).window(np.random.default_rng(0), 295)
    assert len(window) == 295 == len(set(window))


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("needle", {}, "unknown task 'needle'; allowed are code_lookup, common_words, .*, variable_tracking"),
        ("passkey", {"split": "validation"}, "split='validation'; a task's split is 'train' or 'test'"),
        ("passkey", {"count": 0}, "count=0 examples"),
        ("passkey", {"documents": []}, "needs filler text and got none"),
        ("passage_repeat", {"length": 10**6}, "filler text and the documents have"),
        *((name, {"length": 100}, f"length=100 tokens is too short for the task '{name}'") for name in NAMES_OF_TASKS),
    ],
)
def test_bad_input_names_value_and_way_out(tokenizer, token_documents, name, changes, message):
    with pytest.raises(ValueError, match=message):
        make(name, **{"tokenizer": tokenizer, "documents": token_documents, **changes})


def test_text_without_long_sentences_is_refused(tokenizer):
    document = TokenDocument("list", np.array(tokenizer.encode("stone. river. lamp. " * 400), dtype=np.int32))
    with pytest.raises(ValueError, match="found no sentence of 23 to 38 words.*another task such as 'passage_repeat'"):
        make("sentence_recall", tokenizer, [document])
