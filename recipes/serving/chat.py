"""One request on its way through the engine, and what comes of it."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from retention_gates.recipes.serving.sampling import Sampler, Sampling
from retention_gates.recipes.serving.text import TextStream


class Refused(Exception):
    """A request that gets no answer: HTTP status, message, and a code for programs; for some, when to come again."""

    def __init__(
        self, status: int, message: str, *, code: str, param: str | None = None, retry_after: int | None = None
    ):
        super().__init__(message)
        self.status, self.message, self.code = status, message, code
        self.param, self.retry_after = param, retry_after  # retry_after in seconds


@dataclass(frozen=True)
class Ended:
    """The end of a chat: reason "stop", "length" or "cancelled", or an error; counts in tokens."""

    reason: str
    prompt_tokens: int
    completion_tokens: int
    error: Refused | None = None


class Chat:
    """A prompt and what is wanted of it. `deliver` is called in the engine's thread: pieces of text, then `Ended`."""

    def __init__(
        self,
        ids: Sequence[int],
        sampling: Sampling,
        deliver: Callable[[str | Ended], None],
        *,
        timeout: float,
        is_continuation: bool = False,
    ):
        self.ids = ids
        self.sampling = sampling
        self.deliver = deliver
        self.is_continuation = is_continuation  # whether the answer is to be read behind the prompt, as one text
        self.arrived = time.monotonic()  # seconds
        self.deadline = self.arrived + timeout
        self.is_cancelled = False
        self.is_waiting = True  # until its prompt begins to be read
        self.read = 0  # tokens of the prompt
        self.tokens = 0  # of the answer
        self.last = 0  # the token that enters next
        self.sampler: Sampler
        self.text: TextStream

    @property
    def position(self) -> int:
        """Of the token that enters next."""
        return len(self.ids) + self.tokens - 1

    def end(self, reason: str, error: Refused | None = None) -> None:
        self.deliver(Ended(reason, len(self.ids), self.tokens, error))
