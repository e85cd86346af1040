"""A tiny byte-level tokenizer with a chat template, and text for it in long sentences."""

import random

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from retention_gates.data.sources import Document
from retention_gates.data.tokens import TokenDocument, tokenize_documents

SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
WORDS = (
    "the a of and river stone winter garden harbour walked slowly towards over under bright hidden quiet letter "
    "morning evening carried found nobody answered lamp window music corner market bridge paper silver green old"
).split()

CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def make_text(seed: int, sentences: int = 60) -> str:
    """Sentences of 10 to 34 random words, five to a paragraph."""
    rng = random.Random(seed)
    lines = [" ".join(rng.choices(WORDS, k=rng.randint(10, 34))).capitalize() + "." for _ in range(sentences)]
    return "\n\n".join(" ".join(lines[start : start + 5]) for start in range(0, sentences, 5))


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=500, special_tokens=SPECIAL, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    bpe.train_from_iterator([make_text(0)], trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=bpe, eos_token="<|im_end|>", unk_token="<|endoftext|>", pad_token="<|im_end|>"
    )
    fast.chat_template = CHAT_TEMPLATE
    return fast


@pytest.fixture(scope="session")
def documents() -> list[Document]:
    return [Document(f"work{seed}", text=make_text(seed)) for seed in range(6)]


@pytest.fixture(scope="session")
def token_documents(documents: list[Document], tokenizer: PreTrainedTokenizerFast) -> list[TokenDocument]:
    return tokenize_documents(documents, tokenizer, progress=False)
