"""Targets under chat templates that rewrite earlier turns, close the last in another way, or mark text themselves."""

import copy

import pytest
from chat_templates import (
    BLOCKS,
    CHANNELS,
    CLOSED_REASONING,
    HIDDEN_QUESTIONS,
    LAST_REASONING,
    NO_REASONING,
    OPENED_REASONING,
    TEMPLATES,
    TOKEN_AT_THE_END,
    WORDS,
    check_rows,
)
from chats import byte_tokenizer, one_row, target_texts, with_template
from hypothesis import given
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from retention_gates.data.chat import encode_chat
from retention_gates.data.files import BadRow
from retention_gates.data.reading import Reading
from retention_gates.data.sources import Document
from retention_gates.data.tokens import tokenize_documents


def user(text: str) -> dict:
    return {"role": "user", "content": text}


def assistant(text: str, **more: str) -> dict:
    return {"role": "assistant", "content": text, **more}


PLAIN = [user("the river"), assistant("old stone"), user("and?"), assistant("quiet"), user("more"), assistant("green")]


@pytest.fixture(scope="module")
def controlled() -> PreTrainedTokenizerFast:
    return byte_tokenizer()


@pytest.fixture(scope="module")
def swallowing() -> PreTrainedTokenizerFast:
    return byte_tokenizer(swallows=True)


def targets_of(messages: list[dict], tokenizer: PreTrainedTokenizerFast) -> list[list[str]]:
    return [target_texts(row.ids, row.targets, tokenizer) for row in encode_chat(messages, tokenizer)]


def with_reasoning(messages: list[dict]) -> list[dict]:
    return [
        m | {"content": f"<think>\nhm, {i}\n</think>\n\n{m['content']}"} if m["role"] == "assistant" else m
        for i, m in enumerate(messages)
    ]


def test_turns_that_read_otherwise_in_the_whole_chat_get_rows_of_their_own(controlled):
    chat = with_template(controlled, LAST_REASONING)
    none = "<think>\n\n</think>\n\n"
    assert targets_of(PLAIN, chat) == [
        [f"{none}green<|im_end|>"],
        [f"{none}quiet<|im_end|>"],
        [f"{none}old stone<|im_end|>"],
    ]
    assert targets_of(with_reasoning(PLAIN), chat) == [
        ["<think>\nhm, 5\n</think>\n\ngreen<|im_end|>"],
        ["<think>\nhm, 3\n</think>\n\nquiet<|im_end|>"],
        ["<think>\nhm, 1\n</think>\n\nold stone<|im_end|>"],
    ]
    own = with_template(controlled, OPENED_REASONING)
    assert targets_of(PLAIN[:4], own) == [["\n</think>\n\nquiet<|im_end|>"], ["\n</think>\n\nold stone<|im_end|>"]]


def test_turns_behind_the_last_question_share_a_row(controlled):
    tools = [
        user("the river"),
        assistant("<think>a</think>look"),
        {"role": "tool", "content": "wet"},
        assistant("wet"),
    ]
    assert targets_of(tools, with_template(controlled, LAST_REASONING)) == [
        ["<think>\na\n</think>\n\nlook<|im_end|>", "<think>\n\n</think>\n\nwet<|im_end|>"]
    ]


def test_turns_that_only_close_otherwise_share_a_row(controlled):
    phi = with_template(controlled, TOKEN_AT_THE_END)
    assert targets_of(PLAIN, phi) == [["old stone<|end|>", "quiet<|end|>", "green<|end|>\n<|endoftext|>"]]
    channels = with_template(controlled, CHANNELS)
    final = "<|channel|>final<|message|>"
    assert targets_of(PLAIN, channels) == [[f"{final}old stone", f"{final}quiet", f"{final}green<|return|>"]]


def test_a_turn_behind_other_words_than_in_the_whole_chat_gets_a_row_of_its_own(controlled):
    hidden = with_template(controlled, HIDDEN_QUESTIONS)
    assert targets_of(PLAIN[:4], hidden) == [["quiet<|end|>"], ["old stone<|end|>"]]


def test_reasoning_in_a_channel_is_a_target_where_it_stands(controlled):
    thinking = [m | {"thinking": "hm"} if m["role"] == "assistant" else m for m in PLAIN[:4]]
    analysis = "<|channel|>analysis<|message|>hm<|end|><|im_start|>assistant<|channel|>final<|message|>"
    assert targets_of(thinking, with_template(controlled, CHANNELS)) == [
        [f"{analysis}quiet<|return|>"],
        [f"{analysis}old stone<|return|>"],
    ]


def test_a_turn_behind_a_header_that_the_prompt_goes_beyond(controlled):
    r1 = with_template(controlled, NO_REASONING)
    assert targets_of(PLAIN[:2], r1) == [["old stone<|end|>"]]
    assert targets_of(with_reasoning(PLAIN), r1) == [["\n\nold stone<|end|>", "\n\nquiet<|end|>", "\n\ngreen<|end|>"]]
    letters = [
        user("content"),
        assistant("content <thin"),
    ]  # begins as the prompt goes on, and as our own content does
    assert targets_of(letters, r1) == [["content <thin<|end|>"]]


def test_a_turn_with_reasoning_that_the_prompt_closes(controlled):
    chat = with_template(controlled, CLOSED_REASONING)
    assert targets_of(PLAIN[:2], chat) == [["old stone<|im_end|>"]]
    assert targets_of(with_reasoning(PLAIN[:2]), chat) == [["hm, 1\n</think>\n\nold stone<|im_end|>"]]
    assert targets_of([user("a"), assistant("<think>\n\n\nb</think>c")], chat) == [["b\n</think>\n\nc<|im_end|>"]]


@pytest.mark.parametrize("template", TEMPLATES.values(), ids=TEMPLATES)
def test_a_chat_may_begin_with_the_assistant(controlled, template):
    chat = [assistant("welcome"), *PLAIN[:2]]
    rows = targets_of(chat, with_template(controlled, template))
    assert sorted(("welcome" in text) + 2 * ("old stone" in text) for row in rows for text in row) == [1, 2]
    refuses = "{{ raise_exception('first') if messages[0]['role'] == 'assistant' else '' }}" + template
    with pytest.raises(BadRow, match="refuses this chat \\(TemplateError: first\\)"):
        encode_chat(chat, with_template(controlled, refuses))


def test_what_a_template_refuses_on_the_way_costs_that_turn_alone(controlled):
    even = "{{ raise_exception('even') if messages | length is odd else '' }}" + TOKEN_AT_THE_END
    chat = [user("the river"), assistant("old stone"), user("and?"), user("more"), assistant("green"), user("thanks")]
    (row,) = encode_chat(chat, with_template(controlled, even))  # the first has no prompt, the second has no end
    assert target_texts(row.ids, row.targets, controlled) == ["old stone<|end|>"] and row.turns == 1


CONTENTS = st.lists(st.sampled_from(WORDS), max_size=8).map("".join)


@given(
    name=st.sampled_from(sorted(TEMPLATES)),
    roles=st.lists(st.sampled_from(["user", "assistant", "tool"]), min_size=1, max_size=7),
    data=st.data(),
)
def test_every_target_is_what_the_model_would_write_there(controlled, name, roles, data):
    messages = [{"role": role, "content": data.draw(CONTENTS)} for role in [*roles, "assistant"]]
    tokenizer = with_template(controlled, TEMPLATES[name])
    check_rows(messages, tokenizer)


# ---- templates that mark the assistant's text themselves, and tokens that take white space ----


def test_a_block_that_ends_in_white_space_that_the_tokenizer_drops(swallowing):
    ids, targets = one_row(PLAIN[:5], with_template(swallowing, BLOCKS))
    assert ids == swallowing.encode(with_template(swallowing, BLOCKS).apply_chat_template(PLAIN[:5], tokenize=False))
    assert target_texts(ids, targets, swallowing) == ["old stone<|end|>", "quiet<|end|>"]


def test_white_space_that_a_token_before_the_turn_takes_is_no_target(swallowing):
    chat = [user("river"), assistant("\n old stone"), user("and?"), assistant("quiet")]
    for template in (BLOCKS, TOKEN_AT_THE_END):
        ids, targets = one_row(chat, with_template(swallowing, template))
        assert [text.strip() for text in target_texts(ids, targets, swallowing)][:1] == ["old stone<|end|>"]
        assert not targets[ids.index(swallowing.convert_tokens_to_ids("<|assistant|>"))]


@given(contents=st.lists(CONTENTS, min_size=2, max_size=6), takes_space=st.booleans())
def test_blocks_hold_the_same_as_their_turns(controlled, swallowing, contents, takes_space):
    tokenizer = swallowing if takes_space else controlled
    messages = [(assistant if i % 2 else user)(text) for i, text in enumerate(contents)]
    own = with_template(tokenizer, BLOCKS)
    ids, targets = one_row(messages, own)
    bare = with_template(tokenizer, BLOCKS.replace("{% generation %}", "").replace("{% endgeneration %}", ""))
    same_ids, same_targets = one_row(messages, bare)
    assert ids == same_ids
    # the block's last white space is a target where it is a token at all
    assert [t.rstrip() for t in target_texts(ids, targets, own)] == target_texts(same_ids, same_targets, bare)


def test_the_blocks_of_a_turn_are_one_turn(controlled):
    twice = BLOCKS.replace(
        "{{ m.content + '<|end|>\n' }}", "{{ m.content }}{% endgeneration %}{% generation %}{{ '<|end|>' }}"
    )
    (row,) = encode_chat(PLAIN, with_template(controlled, twice))
    assert row.turns == 3


# ---- what a run says of it ----


def test_turns_are_counted_once(controlled):
    hidden = copy.deepcopy(PLAIN)
    hidden[1]["content"] = ""
    documents = [Document("a", messages=PLAIN), Document("b", messages=hidden), Document("c", text="the river")]
    found = tokenize_documents(documents, with_template(controlled, CHANNELS), progress=False)
    assert [(d.work, d.turns, d.lost_turns) for d in found] == [("a", 3, 0), ("b", 3, 0), ("c", 0, 0)]
    found = tokenize_documents(documents[:1], with_template(controlled, LAST_REASONING), progress=False)
    assert [(d.work, d.turns, d.lost_turns) for d in found] == [("a", 1, 0)] * 3
    assert [d.is_repeat for d in found] == [False, True, True]
    assert "2 of 3 assistant turns are targets" in str(Reading("r", 1, 9, turns=2, lost_turns=1))
