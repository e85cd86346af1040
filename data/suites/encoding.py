"""Questions of a suite as token ids."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jinja2
from transformers import PreTrainedTokenizerBase

from retention_gates.data.suites.base import SuiteExample
from retention_gates.data.tokens import document_prefix


@dataclass(frozen=True)
class EncodedQuestion:
    """A prompt in tokens and the question that it came from; `cut` is how many tokens of it were left out."""

    prompt_ids: list[int]
    question: SuiteExample
    cut: int = 0

    @property
    def task(self) -> str:
        return self.question.task

    @property
    def max_new_tokens(self) -> int:
        return self.question.max_new_tokens

    def score(self, answer: str) -> float:
        """See `SuiteExample.score`."""
        return self.question.score(answer)


def encode_questions(
    questions: Sequence[SuiteExample],
    tokenizer: PreTrainedTokenizerBase,
    *,
    chat: bool | None = None,
    longest_prompt: int | None = None,
) -> list[EncodedQuestion]:
    """Prompts in the model's chat form, or as plain text that the answer continues.

    Args:
        chat: use the chat template; None: if the tokenizer has one.
        longest_prompt: tokens of the longest prompt; of a longer one the middle is left out, as LongBench
            (arXiv 2308.14508) does. None: nothing is left out.

    Raises:
        ValueError: a chat was asked for and there is no template, or the template refuses it.
    """
    if chat is None:
        chat = bool(tokenizer.chat_template)
    if chat and not tokenizer.chat_template:
        raise ValueError(f"the tokenizer {tokenizer.name_or_path!r} has no chat template; use chat=False")
    if longest_prompt is not None and longest_prompt < 2:
        raise ValueError(f"longest_prompt={longest_prompt} tokens must be 2 or more, or None")
    encoded = []
    for question in questions:
        ids = _chat_ids(question, tokenizer) if chat else _plain_ids(question, tokenizer)
        cut = 0 if longest_prompt is None else max(0, len(ids) - longest_prompt)
        if cut and longest_prompt is not None:
            front = longest_prompt // 2
            ids = ids[:front] + ids[len(ids) - (longest_prompt - front) :]
        encoded.append(EncodedQuestion(ids, question, cut))
    return encoded


def chat_prompt(
    messages: Sequence[dict[str, Any]], tokenizer: PreTrainedTokenizerBase, place: str, answer_prefix: str = ""
) -> list[int]:
    """Token ids of a chat that the model is to go on with, in its own form.

    Args:
        place: what an error calls the chat.

    Raises:
        ValueError: there is no chat template, or it refuses the chat.
    """
    if not tokenizer.chat_template:
        raise ValueError(
            f"the tokenizer {tokenizer.name_or_path!r} has no chat template, so that the model cannot be asked: name "
            "a chat model"
        )
    try:
        text = tokenizer.apply_chat_template(list(messages), add_generation_prompt=True, tokenize=False)
    except jinja2.TemplateError as error:
        raise ValueError(f"the tokenizer's chat template refuses {place}: {error}") from error
    return tokenizer.encode(f"{text}{answer_prefix}", add_special_tokens=False, verbose=False)


def _chat_ids(question: SuiteExample, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    return chat_prompt(question.messages, tokenizer, f"a question of {question.task}", question.answer_prefix)


def _plain_ids(question: SuiteExample, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    text = "\n\n".join(message["content"].strip("\n") for message in question.messages)
    ending = f"\n\n{question.answer_prefix}" if question.answer_prefix else "\n\n"
    ids = tokenizer.encode(text + ending, add_special_tokens=False, verbose=False)
    return document_prefix(tokenizer) + ids
