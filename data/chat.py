"""Token ids of a chat, and which of them the assistant wrote."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from retention_gates.data.chat_turns import Rendering, render_turns
from retention_gates.data.files import BadRow


@dataclass(frozen=True)
class ChatRow:
    """Tokens of a chat, or of its first turns."""

    ids: list[int]
    targets: np.ndarray  # bool [n]: what the assistant wrote
    turns: int  # the assistant's turns that are targets here


def encode_chat(
    messages: Sequence[dict[str, Any]], tokenizer: PreTrainedTokenizerBase, *, place: str = "this chat"
) -> list[ChatRow]:
    """A chat in the tokenizer's template; its targets are the assistant's turns, as far as they can be told.

    That is one row, unless the template rewrites earlier turns: see `render_turns`. A turn is tokenised apart from
    what stands before it, since that is how a prompt reaches the model. It ends with its end-of-turn token.

    Args:
        place: what the errors call this chat.

    Raises:
        ValueError: there is no template.
        BadRow: no assistant turn, none that can be told, or a chat that the template or the tokenizer refuses.
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
    rows = []
    for rendering in render_turns(messages, tokenizer, place=place):
        try:
            ids, targets = _tokenize(rendering, tokenizer, place)
        except BadRow:
            raise
        except Exception as error:  # of any kind, as the tokenizer pleases
            raise BadRow(f"{place} cannot be tokenised ({type(error).__name__}: {error})") from error
        rows.append(ChatRow(ids, targets, len(rendering.spans)))
    return rows


def _tokenize(rendering: Rendering, tokenizer: PreTrainedTokenizerBase, place: str) -> tuple[list[int], np.ndarray]:
    """The tokens of a rendering, and which of them lie in its spans."""
    text, cuts = rendering.text, [0, *(cut for span in rendering.spans for cut in span), len(rendering.text)]
    parts = [text[start:end] for start, end in pairwise(cuts)]  # every second one is a target
    encoded = tokenizer([*parts, text], add_special_tokens=False, verbose=False)["input_ids"]
    pieces, whole = encoded[:-1], encoded[-1]
    ids = [token for piece in pieces for token in piece]
    if ids == whole or tokenizer.decode(ids) == tokenizer.decode(whole):
        return ids, np.repeat(np.arange(len(pieces)) % 2 == 1, [len(piece) for piece in pieces])
    # This tokenizer swallows white space behind some tokens, or adds some in front of each text.
    if not tokenizer.is_fast:
        raise BadRow(
            f"the tokenizer {tokenizer.name_or_path!r} changes {place} when it is tokenised turn by turn, and does "
            "not tell where its tokens stand; use a fast one"
        )
    offsets = tokenizer(text, add_special_tokens=False, verbose=False, return_offsets_mapping=True)["offset_mapping"]
    targets = np.zeros(len(whole), dtype=bool)
    spans = iter(rendering.spans)
    start, end = next(spans)
    for index, (first, last) in enumerate(offsets):
        word = text[first:last]
        first += len(word) - len(word.lstrip()) if word.strip() else 0  # white space that a control token swallows
        while first >= end:
            start, end = next(spans, (len(text), len(text) + 1))
        targets[index] = first >= start
        if (first < start < last and text[start:last].strip()) or (first >= start and text[end:last].strip()):
            raise BadRow(
                f"the tokenizer {tokenizer.name_or_path!r} has one token for text on both sides of a turn's edge in "
                f"{place}: {word!r}; give it a chat template that parts turns by control tokens"
            )
    return whole, targets
