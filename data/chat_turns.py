"""Renderings of a chat, and where in them the assistant's turns stand."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from hashlib import sha256
from typing import Any

from transformers import PreTrainedTokenizerBase
from transformers.utils.chat_template_utils import render_jinja_template

from retention_gates.data.files import BadRow, check_text

GENERATION_BLOCK = re.compile(r"\{%-?\s*generation\s*-?%\}")
LONGEST_CONTROL_TOKEN = 256  # characters
Message = dict[str, Any]


@dataclass(frozen=True)
class Rendering:
    """A chat as text, and where in it each assistant's turn is that is a target: its first character, and the end."""

    text: str
    spans: tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class _Turn:
    """A turn at the end of the chat that it ends: what precedes it, and what the assistant wrote."""

    start: int  # characters before it
    before: bytes  # digest of them
    text: str


def render_turns(
    messages: Sequence[Message], tokenizer: PreTrainedTokenizerBase, *, place: str = "this chat"
) -> list[Rendering]:
    """Renderings in which each assistant's turn that can be told is a target once.

    A template with `{% generation %}` blocks says itself what the assistant wrote. Otherwise a turn is told by two
    renderings of the chat that ends with it: without the turn, as a prompt, and with it. Where the whole chat reads
    the same, it is the one rendering of all turns. Many templates rewrite earlier turns, though: they cut out the
    reasoning of all but the last, or close the last one in another way. A turn that reads differently in the whole
    chat is a target in a rendering of its own, of the chat up to this turn, as the model sees it when it generates.

    Raises:
        BadRow: a chat that the template refuses, or in which no turn can be told.
    """
    if GENERATION_BLOCK.search(tokenizer.get_chat_template()):
        return [_render_with_blocks(messages, tokenizer, place)]
    chat = _Chat(messages, tokenizer, place)
    left = {index: turn for index in chat.assistant_turns if (turn := chat.turn(index)) is not None}
    found = []
    for count in dict.fromkeys([len(messages), *(index + 1 for index in reversed(left))]):
        if count < len(messages) and count - 1 not in left:
            continue
        text = chat.render(count)
        spans = {i: span for i, turn in left.items() if i < count and (span := chat.span(turn, text)) is not None}
        if spans:
            found.append(Rendering(text, tuple(spans.values())))
            left = {i: turn for i, turn in left.items() if i not in spans}
    if not found:
        raise BadRow(
            f"the chat template renders no assistant's turn of {place} behind what it renders as the turn's prompt, "
            "so that the assistant's tokens can't be told; use a template with {% generation %} blocks"
        )
    return found


class _Chat:
    """A chat and its renderings."""

    def __init__(self, messages: Sequence[Message], tokenizer: PreTrainedTokenizerBase, place: str):
        self.messages, self.tokenizer, self.place = list(messages), tokenizer, place
        self.assistant_turns = [i for i, message in enumerate(messages) if message["role"] == "assistant"]

    def render(self, count: int, *, prompt: bool = False) -> str:
        """The first `count` messages, as a prompt for the next if asked for."""
        return self._render(self.messages[:count], prompt)

    def _render(self, messages: list[Message], prompt: bool = False) -> str:
        try:
            text = str(self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=prompt))
        except Exception as error:  # of any kind: a template is a program
            raise _refused(self.place, error) from error
        check_text(text, self.place)
        return text

    def turn(self, index: int) -> _Turn | None:
        """The turn at the end of the chat up to it; None if nothing tells where it starts."""
        try:
            text = self.render(index + 1)
        except BadRow:
            if index + 1 == len(self.messages):
                raise
            return None  # a template may refuse to end here
        start = self._start(index, text)
        return None if start is None else _Turn(start, _digest(text[:start]), text[start:])

    def _start(self, index: int, text: str) -> int | None:
        try:
            prompt = self.render(index, prompt=True)
        except BadRow:  # of a chat that begins with the assistant: templates refuse to render no message at all
            prompt = None
        if prompt is not None and text.startswith(prompt):
            return len(prompt)
        start = self._start_of_content(index, text)
        if start is None and prompt is not None:
            return self._start_behind_control_token(index, text, prompt)
        return start

    def _start_of_content(self, index: int, text: str) -> int | None:
        """Where content of our own would stand: the prompt opens reasoning, say, that is left out of the turn."""
        content, given = "content", text + str(self.messages)
        while content in given:
            content += "-of-turn"
        try:
            probe = self._render([*self.messages[:index], {"role": "assistant", "content": content}])
        except BadRow:
            return None
        header, found, _ = probe.partition(content)
        return len(header) if found and text.startswith(header) else None

    def _start_behind_control_token(self, index: int, text: str, prompt: str) -> int | None:
        """Where prompt and turn part, behind a control token: the prompt closes reasoning that the turn has."""
        same = self._shared(prompt, text)
        ends_in_token = re.compile(rf"(?:{self._control_tokens.pattern})\s*\Z")
        if not ends_in_token.search(text[max(0, same - LONGEST_CONTROL_TOKEN) : same]):
            return None
        return same if same > self._shared(prompt, self.render(index)) else None

    def _shared(self, one: str, other: str) -> int:
        """Length of the beginning that both have, up to whole control tokens."""
        pairs = enumerate(zip(one, other, strict=False))
        same = next((i for i, (a, b) in pairs if a != b), min(len(one), len(other)))
        for text in (one, other):
            first = max(0, same - LONGEST_CONTROL_TOKEN)
            tokens = self._control_tokens.finditer(text[: same + LONGEST_CONTROL_TOKEN], first)
            same = next((token.start() for token in tokens if token.start() < same < token.end()), same)
        return same

    @cached_property
    def _control_tokens(self) -> re.Pattern[str]:
        """Gives a pattern for the tokens that are one string each, such as the end of a turn."""
        words = sorted(self.tokenizer.get_added_vocab(), key=len, reverse=True)
        return re.compile("|".join(map(re.escape, words)) if words else r"(?!)")

    def span(self, turn: _Turn, text: str) -> tuple[int, int] | None:
        """Where `text` has what the turn consists of, behind the same characters as there; None if it differs.

        It may close with other control tokens, which are no targets then. White space behind a turn is none.
        """
        start = turn.start
        if len(text) <= start or _digest(text[:start]) != turn.before:
            return None
        if text.startswith(turn.text, start):
            same = len(turn.text)
        else:
            same = self._shared(turn.text, text[start : start + len(turn.text) + LONGEST_CONTROL_TOKEN])
            if self._control_tokens.sub("", turn.text[same:]).strip():
                return None
        end = start + len(turn.text[:same].rstrip())
        return (start, end) if end > start else None


def _digest(text: str) -> bytes:
    return sha256(text.encode()).digest()


def _render_with_blocks(messages: Sequence[Message], tokenizer: PreTrainedTokenizerBase, place: str) -> Rendering:
    """The chat with the spans of its `{% generation %}` blocks; blocks without anything between them are one."""
    try:
        options: dict[str, Any] = {"chat_template": tokenizer.get_chat_template(), **tokenizer.special_tokens_map}
        rendered: Any = render_jinja_template([list(messages)], return_assistant_tokens_mask=True, **options)
        (text,), (blocks,) = rendered
    except Exception as error:  # of any kind: a template is a program
        raise _refused(place, error) from error
    check_text(text, place)
    spans: list[tuple[int, int]] = []
    for start, end in blocks:
        if spans and start <= spans[-1][1]:
            spans[-1] = (spans[-1][0], end)
        elif end > start:
            spans.append((start, end))
    if not spans:
        raise BadRow(f"{place} has no target: the chat template marks none of its text as the assistant's")
    return Rendering(text, tuple(spans))


def _refused(place: str, error: Exception) -> BadRow:
    return BadRow(f"the tokenizer's chat template refuses {place} ({type(error).__name__}: {error})")
