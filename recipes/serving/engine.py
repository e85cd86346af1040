"""The thread that lets many chats share one batch: it admits, reads prompts, decodes, and ends."""

import logging
import math
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from transformers import PreTrainedTokenizerFast

from retention_gates.gates.policies.eviction_rule import MOST_TOKENS
from retention_gates.recipes.serving.chat import Chat, Refused
from retention_gates.recipes.serving.rows import ChatRows
from retention_gates.recipes.serving.sampling import Sampler, next_tokens
from retention_gates.recipes.serving.text import TextStream, special_tokens

logger = logging.getLogger(__name__)
UNHEALTHY = 3  # steps that fail in a row


@dataclass
class Counts:
    """Counts of events since the start."""

    ended: dict[str, int] = field(default_factory=dict)  # chats by how they ended
    refused: int = 0  # chats for which there was no place
    prompt_tokens: int = 0
    completion_tokens: int = 0
    steps: int = 0
    first_tokens: int = 0
    first_token_seconds: float = 0.0  # from arrival, summed
    chat_seconds: float = 0.0  # from arrival to the end, of chats that ended by themselves, summed


class Engine:
    """Decodes as many chats at a time as there are rows; `most_waiting` others wait or are read, the next are refused.

    Between two steps at most one chunk of one prompt is read, so that a long prompt does not stop the others. An error
    ends the chats it concerns, never the thread.
    """

    def __init__(
        self, rows: ChatRows, count: int, tokenizer: "PreTrainedTokenizerFast", *, eos: set[int], most_waiting: int
    ):
        self.rows = rows
        self.tokenizer = tokenizer
        self.special = special_tokens(tokenizer)
        self.eos = eos
        self.most_waiting = most_waiting
        self.running: list[Chat | None] = [None] * count
        self.reading: Chat | None = None
        self.waiting: deque[Chat] = deque()
        self.arriving = 0  # requests that are being read
        self.counts = Counts()
        self.failed_steps = 0  # in a row
        self.is_draining = False
        self._is_closed = False
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._run, name="retention-gates-engine", daemon=True)

    def start(self) -> None:
        self._thread.start()

    @property
    def is_healthy(self) -> bool:
        return self._thread.is_alive() and not self.is_draining and self.failed_steps < UNHEALTHY

    @property
    def active(self) -> int:
        """Chats that have a row."""
        return sum(chat is not None for chat in self.running)

    @property
    def pending(self) -> int:
        """Chats that wait for a row, and requests that are still being read."""
        return len(self.waiting) + self.arriving

    @contextmanager
    def admitted(self) -> Iterator[Callable[[Chat], None]]:
        """A place among those that wait, while a request is read; gives what hands its chat over.

        Raises:
            Refused: here or at the handing over, if the engine is closed; here, if as many wait as may.
        """
        with self._changed:
            self._check_open()
            waiting = self.pending
            # those that a free row is there for do not wait for others
            if waiting >= self.most_waiting + self.running.count(None):
                self.counts.refused += 1
                raise Refused(
                    429,
                    f"All {len(self.running)} places are taken and {waiting} requests wait.",
                    code="server_busy",
                    retry_after=self._retry_after(),
                )
            self.arriving += 1
        is_arriving = True

        def hand_over(chat: Chat) -> None:
            nonlocal is_arriving
            with self._changed:
                self._check_open()
                is_arriving = False
                self.arriving -= 1
                self.waiting.append(chat)
                self._changed.notify()

        try:
            yield hand_over
        finally:
            if is_arriving:
                with self._changed:
                    self.arriving -= 1

    def submit(self, chat: Chat) -> None:
        """Takes a chat in.

        Raises:
            Refused: if the engine is closed or as many wait as may.
        """
        with self.admitted() as hand_over:
            hand_over(chat)

    def _check_open(self) -> None:
        if self.is_draining:
            raise shutting_down()

    def cancel(self, chat: Chat) -> None:
        """Ends a chat at the next step, wherever it is; nothing happens if it has ended."""
        chat.is_cancelled = True
        with self._changed:
            self._changed.notify()

    @property
    def unfinished(self) -> int:
        """Chats and requests that have a place, wherever they are."""
        return self.active + (self.reading is not None) + self.pending

    def drain(self) -> None:
        """Takes in no more chats and ends those that wait; the others go on."""
        with self._changed:
            self.is_draining = True
            self._changed.notify()

    def close(self) -> None:
        """Ends every chat with an error and the thread with them."""
        with self._changed:
            self.is_draining = self._is_closed = True
            self._changed.notify()
        self._thread.join()
        self.rows.close()

    def _retry_after(self) -> int:
        """Seconds until the queue should be empty."""
        ended = self.counts.ended.get("stop", 0) + self.counts.ended.get("length", 0)
        each = self.counts.chat_seconds / ended if ended else 1.0
        return min(60, max(1, math.ceil(each * self.pending / len(self.running))))

    # ---- in the thread ----

    def _run(self) -> None:
        while True:
            with self._changed:
                while not (self._is_closed or self.waiting or self.reading or self.active):
                    self._changed.wait()
                if self._is_closed:
                    break
            try:
                self._drop_late()
                self._read()
                self._decode()
            except Exception as error:  # what is not of one chat
                self._fail_all(error)
        self._end_all("error", shutting_down())

    def _chats(self) -> list[Chat]:
        with self._changed:
            waiting = list(self.waiting)
        return [chat for chat in (*self.running, self.reading, *waiting) if chat is not None]

    def _drop_late(self) -> None:
        now = time.monotonic()
        for chat in self._chats():
            if chat.is_cancelled:
                self._end(chat, "cancelled")
            elif self.is_draining and chat.is_waiting:
                self._end(chat, "error", shutting_down())
            elif now > chat.deadline:
                took = f"The answer was not complete after {now - chat.arrived:.0f} s."
                self._end(chat, "timeout", Refused(504, took, code="timeout"))

    def _read(self) -> None:
        """Reads the next chunk of the prompt that is being read, or begins with the one that has waited longest."""
        if self.reading is None:
            with self._changed:
                if not self.waiting or self.active == len(self.running):
                    return
                if self.rows.steps + self.rows.context > MOST_TOKENS:  # once in days: start anew when all have ended
                    if self.active:
                        return
                    self.rows.reset()
                self.reading = self.waiting.popleft()
                self.reading.is_waiting = False
        chat = self.reading
        try:
            chunk = list(chat.ids[chat.read : chat.read + self.rows.chunk_size])
            logits = self.rows.read(chunk, chat.read)
            chat.read += len(chunk)
            if chat.read < len(chat.ids):
                return
            chat.sampler = Sampler(chat.sampling)
            before = chat.ids if chat.is_continuation else ()
            chat.text = TextStream(self.tokenizer, chat.sampling.stop, self.special, before)
            first = next_tokens(logits, {0: chat.sampler})[0]
            row = self.running.index(None)
            self.rows.place(row)
        except Exception as error:
            logger.exception("A prompt of %d tokens could not be read", len(chat.ids))
            self.failed_steps += 1
            self._end(chat, "error", _failure(error))
            return
        self.counts.prompt_tokens += len(chat.ids)
        self.counts.first_tokens += 1
        self.counts.first_token_seconds += time.monotonic() - chat.arrived
        self.reading, self.running[row] = None, chat
        self._take(chat, first)

    def _decode(self) -> None:
        self._close_ranks()
        chats = {row: chat for row, chat in enumerate(self.running) if chat is not None}
        if not chats:
            return
        count = self.rows.count_for(max(chats) + 1)
        tokens, positions = [0] * count, [0] * count
        for row, chat in chats.items():
            tokens[row], positions[row] = chat.last, chat.position
        logits = self.rows.step(tokens, positions)
        chosen = next_tokens(logits, {row: chat.sampler for row, chat in chats.items()})
        self.failed_steps = 0
        self.counts.steps += 1
        for row, chat in chats.items():
            self._take(chat, chosen[row])

    def _close_ranks(self) -> None:
        """Moves the last chats to free rows where a step can then have fewer."""
        while self.active:
            last = max(row for row, chat in enumerate(self.running) if chat is not None)
            if self.rows.count_for(self.active) == self.rows.count_for(last + 1):
                return
            free = self.running.index(None)
            self.rows.move(last, free)
            self.running[free], self.running[last] = self.running[last], None

    def _take(self, chat: Chat, token: int | None) -> None:
        """One more token of a chat's answer, which may be the last; what goes wrong with it is the chat's own."""
        try:
            self._write(chat, token)
        except Exception as error:
            logger.exception("Token %s of a chat could not be written", token)
            if chat in self.running:
                self._end(chat, "error", Refused(500, f"Text failed: {type(error).__name__}.", code="server_error"))

    def _write(self, chat: Chat, token: int | None) -> None:
        if token is None:
            return self._end(chat, "error", Refused(500, "The model gave NaN.", code="model_error"))
        chat.tokens += 1
        chat.last = token
        self.counts.completion_tokens += 1
        if token not in self.eos:
            if piece := chat.text.add(token):
                chat.deliver(piece)
            if not chat.text.is_stopped and chat.tokens < chat.sampling.max_tokens:
                return None
        reason = "stop" if token in self.eos or chat.text.is_stopped else "length"
        if rest := chat.text.end():
            chat.deliver(rest)
        if chat.text.is_stopped:  # a stop string that only the last half character completed
            reason = "stop"
        self.counts.chat_seconds += time.monotonic() - chat.arrived
        return self._end(chat, reason)

    def _end(self, chat: Chat, reason: str, error: Refused | None = None) -> None:
        with self._changed:
            if chat is self.reading:
                self.reading = None
            elif chat in self.running:
                self.running[self.running.index(chat)] = None
            else:
                self.waiting.remove(chat)
            self.counts.ended[reason] = self.counts.ended.get(reason, 0) + 1
        chat.end(reason, error)

    def _end_all(self, reason: str, error: Refused) -> None:
        for chat in self._chats():
            self._end(chat, reason, error)

    def _fail_all(self, error: Exception) -> None:
        logger.exception("A step failed; its chats end and the rows start anew")
        self.failed_steps += 1
        for chat in [chat for chat in self.running if chat is not None]:
            self._end(chat, "error", _failure(error))
        if self.reading is not None:  # what was read of it is forgotten with the others
            self.reading.read = 0
        try:
            self.rows.reset()
        except Exception:  # a device that is lost: what comes next fails as well, and is_healthy says so
            logger.exception("The rows could not be reset")


def shutting_down() -> Refused:
    return Refused(503, "The server is shutting down.", code="shutting_down", retry_after=5)


def _failure(error: Exception) -> Refused:
    return Refused(500, f"The model failed: {type(error).__name__}.", code="model_error")
