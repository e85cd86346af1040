"""Token ids of a chat, and which of them the assistant wrote."""

import re
from collections.abc import Sequence
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from retention_gates.data.files import BadRow, check_text

GENERATION_BLOCK = re.compile(r"\{%-?\s*generation\s*-?%\}")


def encode_chat(
    messages: Sequence[dict[str, Any]], tokenizer: PreTrainedTokenizerBase, *, place: str = "this chat"
) -> tuple[list[int], np.ndarray]:
    """Token ids of a chat in the tokenizer's template, and the mask of those that are targets: the assistant's turns.

    A template with `{% generation %}` blocks says itself which tokens are the assistant's. Otherwise the chat is
    rendered up to each assistant turn, without and with that turn; both must begin the whole chat's text, or else a
    model would be trained on something it never sees when it generates. Each turn is tokenised apart from what stands
    before it, since that is how a prompt reaches the model. A turn ends with its end-of-turn token; white space that
    the template puts behind is no target.

    Args:
        place: what the errors call this chat.

    Raises:
        BadRow: no template, no assistant turn, a chat that the template refuses, or a template that rewrites
            earlier turns (some cut out the reasoning of all but the last).
    """
    if not any(message["role"] == "assistant" for message in messages):
        raise BadRow(
            f"{place} has no assistant turn (roles: {', '.join(message['role'] for message in messages)}), so it has "
            "no target to learn; drop it, or load its column as plain text"
        )
    if not tokenizer.chat_template:
        raise ValueError(
            f"the tokenizer {tokenizer.name_or_path!r} has no chat template and can't encode {place}; use the "
            "tokenizer of a chat model, or set tokenizer.chat_template"
        )
    try:
        if GENERATION_BLOCK.search(tokenizer.get_chat_template()):
            encoded: Any = tokenizer.apply_chat_template(
                list(messages), return_dict=True, return_assistant_tokens_mask=True
            )
            ids, targets = encoded["input_ids"], np.array(encoded["assistant_masks"], dtype=bool)
        else:
            ids, targets = _encode_by_prefixes(list(messages), tokenizer, place)
    except BadRow:
        raise
    except Exception as error:  # of any kind: a template is a program
        raise BadRow(f"the tokenizer's chat template refuses {place} ({type(error).__name__}: {error})") from error
    if not targets.any():
        raise BadRow(f"{place} has no target: the chat template marks none of its tokens as the assistant's")
    return ids, targets


def _encode_by_prefixes(
    messages: list[dict[str, Any]], tokenizer: PreTrainedTokenizerBase, place: str
) -> tuple[list[int], np.ndarray]:
    def render(count: int, *, prompt: bool = False) -> str:
        text = str(tokenizer.apply_chat_template(messages[:count], tokenize=False, add_generation_prompt=prompt))
        check_text(text, place)
        return text

    if messages[0]["role"] == "assistant":
        raise BadRow(
            f"{place} begins with an assistant turn, so nothing tells where the template's own text ends; drop that "
            "turn, or use a template with {% generation %} blocks"
        )
    text = render(len(messages))
    ids: list[int] = []
    targets: list[bool] = []
    done = 0  # characters of the text that are tokenised
    for index, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        before, after = render(index, prompt=True), render(index + 1)
        if not (text.startswith(after) and after.startswith(before) and len(before) >= done):
            raise BadRow(
                f"the chat template renders {place} up to turn {index} differently than inside the whole chat, so "
                "the assistant's tokens can't be told exactly; use a template with {% generation %} blocks, or cut "
                "the chats to a single assistant turn"
            )
        for part, is_target in ((text[done : len(before)], False), (after[len(before) :].rstrip(), True)):
            part_ids = tokenizer.encode(part, add_special_tokens=False) if part else []
            ids += part_ids
            targets += [is_target] * len(part_ids)
        done = len(before) + len(after[len(before) :].rstrip())
    rest = tokenizer.encode(text[done:], add_special_tokens=False) if text[done:] else []
    ids, targets = ids + rest, targets + [False] * len(rest)
    whole = tokenizer.encode(text, add_special_tokens=False)
    if ids != whole and tokenizer.decode(ids) != tokenizer.decode(whole):
        raise BadRow(
            f"the tokenizer {tokenizer.name_or_path!r} adds text when {place} is tokenised turn by turn; give it a "
            "chat template with {% generation %} blocks"
        )
    return ids, np.array(targets, dtype=bool)
