import pytest
from chats import one_row, target_texts, with_template
from transformers import PreTrainedTokenizerFast

from retention_gates.data.chat import encode_chat
from retention_gates.data.sources import Document
from retention_gates.data.tokens import document_prefix, tokenize_documents

CHAT_TEMPLATE = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
CHAT = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "the river"},
    {"role": "assistant", "content": "\n\n old stone"},
    {"role": "user", "content": "and the garden?"},
    {"role": "assistant", "content": "quiet"},
]
GENERATION_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}{% if message['role'] == 'assistant' %}"
    "{% generation %}{{ message['content'] + '<|im_end|>' }}{% endgeneration %}{% else %}"
    "{{ message['content'] + '<|im_end|>' }}{% endif %}{{ '\n' }}{% endfor %}"
)


def test_only_the_assistants_turns_are_targets(tokenizer):
    ids, targets = one_row(CHAT, tokenizer)
    assert tokenizer.decode(ids) == tokenizer.apply_chat_template(CHAT, tokenize=False)
    assert target_texts(ids, targets, tokenizer) == ["\n\n old stone<|im_end|>", "quiet<|im_end|>"]


def test_what_precedes_a_turn_is_what_a_prompt_would_be(tokenizer):
    ids, targets = one_row(CHAT, tokenizer)
    prompt = tokenizer.apply_chat_template(CHAT[:4], add_generation_prompt=True, return_dict=True)["input_ids"]
    last = len(ids) - targets[::-1].tolist().index(True)
    answer = tokenizer.encode("quiet<|im_end|>")
    assert ids[last - len(answer) : last] == answer
    assert tokenizer.decode(ids[: last - len(answer)]) == tokenizer.decode(prompt)


def test_generation_blocks_give_the_same_targets(tokenizer):
    other = with_template(tokenizer, GENERATION_TEMPLATE)
    ids, targets = one_row(CHAT, other)
    assert target_texts(ids, targets, other) == ["\n\n old stone<|im_end|>", "quiet<|im_end|>"]


@pytest.mark.parametrize(
    ("messages", "template", "message"),
    [
        (CHAT[:2], "{{ messages }}", "line 7 has no assistant turn \\(roles: system, user\\).*no target"),
        (
            CHAT,
            "{{ messages[-1]['content'] if add_generation_prompt else messages | length }}",
            "no assistant's turn of line 7",
        ),
        (CHAT, None, "has no chat template"),
        (
            CHAT,
            "{{ raise_exception('turns must alternate') }}",
            "refuses line 7 \\(TemplateError: turns must alternate\\)",
        ),
        (
            CHAT,
            "{{ messages[0]['content'] }}{% if false %}{% generation %}{% endgeneration %}{% endif %}",
            "no target",
        ),
    ],
)
def test_bad_chats_name_the_chat(tokenizer, messages, template, message):
    with pytest.raises(ValueError, match=message):
        encode_chat(messages, with_template(tokenizer, template), place="line 7")


def test_a_tokenizer_that_adds_text_to_each_part_reads_the_whole():
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    vocabulary = {piece: i for i, piece in enumerate(["<unk>", "▁", "▁a", "▁b", "a", "b", ":", "▁ab"])}
    merges = [("▁", "a"), ("▁", "b"), ("▁a", "b")]
    prefixing = Tokenizer(models.BPE(vocab=vocabulary, merges=merges, unk_token="<unk>"))
    prefixing.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    prefixing.decoder = decoders.Metaspace(prepend_scheme="always")
    fast = PreTrainedTokenizerFast(tokenizer_object=prefixing, unk_token="<unk>")
    fast.chat_template = (
        "{% for message in messages %}{{ message['content'] }}{% if message['role'] == 'user' %}:{% endif %}"
        "{% endfor %}"
    )
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    ids, targets = one_row(messages, fast)
    assert fast.convert_ids_to_tokens(ids) == ["▁a", ":", "b"] and targets.tolist() == [False, False, True]
    joined = with_template(fast, fast.chat_template.replace(":", ""))
    with pytest.raises(ValueError, match="one token for text on both sides of a turn's edge in this chat: 'ab'"):
        one_row(messages, joined)


def test_texts_and_chats_are_tokenised_in_order(tokenizer):
    documents = [Document("a", text="the river"), Document("b", messages=CHAT), Document("c", text="a stone")]
    first, chat, last = tokenize_documents(documents, tokenizer, batch_size=2, progress=False)
    assert [first.work, chat.work, last.work] == ["a", "b", "c"]
    assert tokenizer.decode(first.ids) == "<|endoftext|>the river" and first.targets is None
    assert chat.ids.tolist() == one_row(CHAT, tokenizer)[0] and len(chat.targets) == len(chat.ids)
    assert tokenizer.decode(last.ids) == "<|endoftext|>a stone"
    with pytest.raises(ValueError, match="data set is empty"):
        tokenize_documents([], tokenizer)


def test_the_document_prefix_is_the_tokenizers_own_before_any_separator(tokenizer):
    from tokenizers import Tokenizer, processors

    assert document_prefix(tokenizer) == [tokenizer.convert_tokens_to_ids("<|endoftext|>")]
    opening = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    start = opening.token_to_id("<|im_start|>")
    opening.post_processor = processors.TemplateProcessing(
        single="<|im_start|> $A", special_tokens=[("<|im_start|>", start)]
    )
    assert document_prefix(PreTrainedTokenizerFast(tokenizer_object=opening)) == [start]
    bare = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str().replace("<|endoftext|>", "<|other|>"))
    assert document_prefix(PreTrainedTokenizerFast(tokenizer_object=bare)) == []
