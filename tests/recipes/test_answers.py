"""retention-gates answers: the base's own answers as chats to train on, the same however the command is stopped."""

import json
import shutil

import pytest
import torch
from tiny_run import make_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from retention_gates.cli import main
from retention_gates.data.sources import load_documents, split_by_work
from retention_gates.recipes import answers as command
from retention_gates.recipes.loading.line_file import LineFile

TEMPLATE = (
    "{% for m in messages %}{{ m.role }} {{ m.content }} </s> {% endfor %}"
    "{% if add_generation_prompt %}assistant {% endif %}"
)
QUESTIONS = ["the old ship", "a red road sings", "the king", "under the storm", "a queen runs over and over", "sea"]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """It ends about one answer in ten at each token."""
    folder = make_model(tmp_path_factory.mktemp("model"))
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture
def questions(tmp_path):
    path = tmp_path / "questions.jsonl"
    path.write_text("".join(json.dumps({"question": q}) + "\n" for q in [*QUESTIONS, QUESTIONS[0]]))
    return str(path)


def run(questions, model, output, *more):
    given = ["answers", questions, "--model", model, "--text-field", "question", "--output", str(output)]
    return main([*given, "--device", "cpu", "--max-new-tokens", "12", *more])


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def everything(folder):
    return lines(folder / "answers.jsonl") + lines(folder / "left_out.jsonl")


DRAWN = ("--temperature", "1.5", "--samples", "4", "--seed", "3")


def test_greedy_answers_are_those_of_the_base(questions, model, tmp_path, monkeypatch):
    base = AutoModelForCausalLM.from_pretrained(model)
    tokenizer = AutoTokenizer.from_pretrained(model)
    assert run(questions, model, tmp_path / "out", "--instruction", "and sings", "--batch-size", "3") == 0
    found = everything(tmp_path / "out")
    assert len(found) == len(QUESTIONS)  # the one that stands there twice is asked once
    for record in found:
        user, assistant = record["messages"]
        assert user["content"].removesuffix("\n\nand sings") in QUESTIONS and assistant["role"] == "assistant"
        ids = tokenizer(f"user {user['content']} </s> assistant ", return_tensors="pt", add_special_tokens=False)
        with torch.no_grad():
            out = base.generate(**ids, max_new_tokens=12, do_sample=False, eos_token_id=[], pad_token_id=0)
        wanted = out[0, ids.input_ids.shape[1] :][: record["tokens"]]
        assert assistant["content"] == tokenizer.decode(wanted, skip_special_tokens=True)
    reasons = {record.get("why") for record in found}
    assert reasons <= {None, "had not ended", "blank"} and len(lines(tmp_path / "out" / "answers.jsonl")) < len(found)


def test_a_stopped_run_goes_on_and_gives_what_a_whole_one_gives(questions, model, tmp_path, monkeypatch):
    assert run(questions, model, tmp_path / "whole", *DRAWN, "--batch-size", "5") == 0
    whole = everything(tmp_path / "whole")
    assert len(whole) == 4 * len(QUESTIONS) and len({json.dumps(r["messages"]) for r in whole}) > 3 * len(QUESTIONS)

    def stopping(*arguments, **options):
        for number, answer in enumerate(real(*arguments, **options)):
            if number == 7:
                raise KeyboardInterrupt
            yield answer

    real = command.answer_prompts
    with monkeypatch.context() as patch:
        patch.setattr(command, "answer_prompts", stopping)
        assert run(questions, model, tmp_path / "out", *DRAWN, "--batch-size", "2") == 130
    assert len(everything(tmp_path / "out")) == 7
    with open(tmp_path / "out" / "answers.jsonl", "a") as file:  # killed in the middle of a line
        file.write('{"work": "x", "mess')
    asked = []
    monkeypatch.setattr(command, "answer_prompts", lambda m, ids, **o: asked.append(len(ids)) or real(m, ids, **o))
    assert run(questions, model, tmp_path / "out", *DRAWN) == 0
    assert asked == [4 * len(QUESTIONS) - 7] and everything(tmp_path / "out") == whole
    assert run(questions, model, tmp_path / "out", *DRAWN) == 0
    assert asked[1:] == [0] and everything(tmp_path / "out") == whole


def test_more_samples_add_to_fewer(questions, model, tmp_path):
    few = ("--temperature", "1.5", "--samples", "2", "--seed", "3")
    assert run(questions, model, tmp_path / "out", *few, "--limit", "3") == 0
    before = everything(tmp_path / "out")
    assert len(before) == 6
    assert run(questions, model, tmp_path / "out", *DRAWN) == 0
    after = everything(tmp_path / "out")
    assert len(after) == 4 * len(QUESTIONS) and all(record in after for record in before)


def test_answers_are_split_by_question(questions, model, tmp_path):
    assert run(questions, model, tmp_path / "out", *DRAWN) == 0
    documents = load_documents(str(tmp_path / "out" / "answers.jsonl"), chat_field="messages", work_field="work")
    train, test = split_by_work(documents, test_fraction=0.4)
    asked = [{d.messages[0]["content"] for d in part} for part in (train, test)]
    assert asked[0] and asked[1] and not asked[0] & asked[1]


def test_the_data_sets_own_answers_are_chats_of_the_same_works(model, tmp_path):
    path = tmp_path / "questions.jsonl"
    rows = [{"question": q, "answer": f" {q} sleeps "} for q in QUESTIONS]
    rows[2]["answer"] = " "  # there is none
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    given = ("--limit", "5", "--seed", "2", "--solution-field", "answer", "--instruction", "and sings")
    assert run(str(path), model, tmp_path / "out", *given) == 0
    own = {r["work"]: r["messages"] for r in everything(tmp_path / "out")}
    solutions = lines(tmp_path / "out" / "solutions.jsonl")
    asked = {messages[0]["content"].removesuffix("\n\nand sings") for messages in own.values()}
    assert len(own) == 5 and len(solutions) == 5 - (QUESTIONS[2] in asked)
    for record in solutions:
        user, assistant = record["messages"]
        assert user == own[record["work"]][0]
        question = user["content"].removesuffix("\n\nand sings")
        assert assistant == {"role": "assistant", "content": f"{question} sleeps"} and question != QUESTIONS[2]
    assert run(str(path), model, tmp_path / "other", "--solution-field", "solution") == 2
    assert not (tmp_path / "other").exists()


def test_chats_are_answered_up_to_the_last_users_turn(model, tmp_path):
    turns = [("user", "the king"), ("assistant", "sings"), ("user", "the queen"), ("assistant", "sleeps")]
    chat = [{"role": role, "content": content} for role, content in turns]
    path = tmp_path / "chats.jsonl"
    path.write_text(json.dumps({"chat": chat, "book": "one"}) + "\n")
    given = ["answers", str(path), "--model", model, "--chat-field", "chat", "--work-field", "book", "--device", "cpu"]
    assert main([*given, "--max-new-tokens", "3", "--output", str(tmp_path / "out")]) == 0
    (record,) = everything(tmp_path / "out")
    assert record["messages"][:3] == chat[:3] and len(record["messages"]) == 4 and record["work"] == "one"


MISTAKES = {
    "samples alike": (["--samples", "2"], "--samples 2 --temperature 0: samples=2 of the likeliest tokens"),
    "no temperature": (["--temperature", "nan"], "temperature=nan"),
    "no room": (["--batch-size", "0"], "--batch-size 0 must be 1 or more"),
    "a seed below 0": (["--seed", "-1"], "--seed -1 must be 0 or more"),
    "too long": (["--max-new-tokens", "600"], "positions: leave long ones out with --longest-question"),
    "all too long": (["--longest-question", "2"], "has no question to answer: raise --longest-question"),
    "no such column": (["--text-field", "problem"], "has no column 'problem'"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_write_nothing(questions, model, tmp_path, capsys, mistake):
    given, message = MISTAKES[mistake]
    assert run(questions, model, tmp_path / "out", *given) == 2
    assert message in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_other_answers_are_not_mixed_with_those_there(questions, model, tmp_path, capsys):
    assert run(questions, model, tmp_path / "out") == 0
    before = everything(tmp_path / "out")
    assert run(questions, model, tmp_path / "out", "--seed", "4") == 2
    assert "seed was 0 and is 4 now. Give another --output" in capsys.readouterr().err
    other = tmp_path / "other"
    shutil.copytree(model, other)
    changed = AutoModelForCausalLM.from_pretrained(model)
    changed.lm_head.weight.data.mul_(2)
    changed.save_pretrained(other)
    assert run(questions, str(other), tmp_path / "out") == 2
    assert "weights was" in capsys.readouterr().err and everything(tmp_path / "out") == before


def test_a_model_without_a_chat_template_is_refused(questions, tmp_path, capsys):
    assert run(questions, str(make_model(tmp_path / "plain")), tmp_path / "out") == 2
    assert "has no chat template" in capsys.readouterr().err


@pytest.mark.parametrize("damage", ["nonsense", "[1]", '{"b": 1}', ""])
def test_a_damaged_line_is_named(tmp_path, damage):
    path = tmp_path / "answers.jsonl"
    path.write_text(f'{{"a": 1}}\n{damage}\n{{"a": 2}}\n')
    with pytest.raises(ValueError, match=r"Line 2 of .*answers.jsonl is damaged: delete that line"):
        LineFile(path, ["a"])


def test_samples_that_no_machine_has_room_for(questions, model, tmp_path, capsys):
    assert run(questions, model, tmp_path / "out", "--temperature", "1", "--samples", str(10**12)) == 2
    told = capsys.readouterr().err
    assert f"samples={10**12} takes " in told and "each answer to 6 questions, and cpu has" in told
    assert not (tmp_path / "out").exists()
