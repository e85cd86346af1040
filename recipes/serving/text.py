"""Text out of tokens as they come, up to a stop string."""

from tokenizers.decoders import DecodeStream
from transformers import PreTrainedTokenizerFast


class TextStream:
    """Gives text as soon as it is certain: whole characters, and nothing that may be the start of a stop string."""

    def __init__(self, tokenizer: "PreTrainedTokenizerFast", stop: tuple[str, ...]):
        self.tokenizer = tokenizer.backend_tokenizer
        self.stream = DecodeStream(skip_special_tokens=True)
        self.stop = stop
        self.ids: list[int] = []
        self.text = ""
        self.given = 0  # characters
        self.is_stopped = False

    def add(self, token: int) -> str:
        """What the token makes certain; sets `is_stopped` if a stop string is complete, of which nothing is given."""
        self.ids.append(token)
        self._append(self.stream.step(self.tokenizer, token) or "")
        return self._give(len(self.text) if self.is_stopped else len(self.text) - self._held_back())

    def end(self) -> str:
        """The rest, after the last token."""
        if not self.is_stopped:
            whole = self.tokenizer.decode(self.ids, skip_special_tokens=True)
            if whole.startswith(self.text):  # what is half a character still is shown as such
                self._append(whole[len(self.text) :])
        return self._give(len(self.text))

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
