"""Text out of tokens as they come, up to a stop string."""

from collections.abc import Mapping, Sequence

from transformers import PreTrainedTokenizerFast

CONTEXT = 5  # tokens of a text that goes on: enough for a space or half a character that depends on them
LONGEST_DOUBT = 64  # tokens after which bytes that are no character yet are given as they are
UNKNOWN = "\ufffd"  # what a tokenizer says for bytes that are no character


def special_tokens(tokenizer: "PreTrainedTokenizerFast") -> dict[str, int]:
    """Text -> id of the tokens that are no text of an answer, such as ends of turns."""
    added = tokenizer.backend_tokenizer.get_added_tokens_decoder()
    return {token.content: number for number, token in added.items() if token.special}


class TextStream:
    """Gives text as soon as it is certain: whole characters, and nothing that may be the start of a stop string.

    What tokens add is the text of the last tokens with them, less the text without: a tokenizer's decoder may look at
    neighbours, for spaces and for characters of several bytes. It takes any tokens; bytes that never become a
    character are given as U+FFFD.

    Args:
        stop: texts; one that is a special token ends the answer at that token.
        special: text -> id of special tokens.
        before: tokens of the text that goes on here, the last ones, if the answer is to be read behind it.
    """

    def __init__(
        self,
        tokenizer: "PreTrainedTokenizerFast",
        stop: tuple[str, ...],
        special: Mapping[str, int] | None = None,
        before: Sequence[int] = (),
    ):
        self.tokenizer = tokenizer.backend_tokenizer
        self.stop = stop
        self.stop_ids = {special[one] for one in stop if one in special} if special else set()
        self.ids: list[int] = []
        self.text = ""
        self.given = 0  # characters
        self.is_stopped = False
        self._settled = list(before[-CONTEXT:])  # whose text is given
        self._open: list[int] = []  # whose text may still change
        self._taken = 0  # characters of the open tokens' text that are in `text`

    def add(self, token: int) -> str:
        """Returns the text that the token makes certain; a complete stop string sets `is_stopped` instead."""
        if token in self.stop_ids:
            self.is_stopped = True
            return self._give(len(self.text))
        self.ids.append(token)
        self._open.append(token)
        new = self._new_text()
        certain = new.rstrip(UNKNOWN)
        if certain == new or len(self._open) >= LONGEST_DOUBT:
            self._append(new[self._taken :])
            self._settle(is_text=certain == new)
        elif len(certain) > self._taken:
            self._append(certain[self._taken :])
            self._taken = len(certain)
        return self._give(len(self.text) if self.is_stopped else len(self.text) - self._held_back())

    def end(self) -> str:
        """The rest, after the last token."""
        if not self.is_stopped:
            self._append(self._new_text()[self._taken :])  # what is half a character still is shown as such
            self._open, self._taken = [], 0
        return self._give(len(self.text))

    def _settle(self, *, is_text: bool) -> None:
        """Makes the open text the context of the next tokens, unless it is unknown, as those would then be too."""
        if is_text:
            alone = self._decoded(self._open)  # nothing, of special tokens; unknown, at the end of a character
            is_context = alone and UNKNOWN not in alone
            self._settled = self._open if is_context else (self._settled + self._open)[-LONGEST_DOUBT:]
        self._open, self._taken = [], 0

    def _new_text(self) -> str:
        """The text of the open tokens, behind the settled ones."""
        before = self._decoded(self._settled).rstrip(UNKNOWN)
        both = self._decoded(self._settled + self._open)
        # a byte that is no character may make unknown the bytes before it
        return both[len(before) :] if both.startswith(before) else self._decoded(self._open)

    def _decoded(self, ids: list[int]) -> str:
        text: str = self.tokenizer.decode(ids, skip_special_tokens=True)
        return text

    def _append(self, piece: str) -> None:
        before, self.text = len(self.text), self.text + piece
        found = [self.text.find(stop, max(0, before - len(stop) + 1)) for stop in self.stop]
        if places := [place for place in found if place >= 0]:
            self.text, self.is_stopped = self.text[: min(places)], True

    def _held_back(self) -> int:
        """Characters at the end that a stop string may begin with."""
        longest = max((len(stop) for stop in self.stop), default=1) - 1
        lengths = range(min(longest, len(self.text)), 0, -1)
        return next((n for n in lengths if any(stop.startswith(self.text[-n:]) for stop in self.stop)), 0)

    def _give(self, until: int) -> str:
        piece, self.given = self.text[self.given : until], max(until, self.given)
        return piece
