"""The way of a request from its first byte to the engine: a place, a bounded body, what it says, its tokens."""

import asyncio
import json
from array import array
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from transformers import PreTrainedTokenizerFast

from retention_gates.data.tokens import document_prefix
from retention_gates.recipes.serving.chat import Refused
from retention_gates.recipes.serving.engine import shutting_down
from retention_gates.recipes.serving.protocol import Wish, bad, read_wish
from retention_gates.recipes.serving.text import special_tokens

if TYPE_CHECKING:  # of the extra "serve"
    from starlette.requests import Request

SMALL = 2**16  # bytes of a body, or characters of a prompt, that are never held up by larger ones
LARGE_AT_A_TIME = 4  # requests above that whose bodies and tokens are in memory together
CHARACTERS_PER_TOKEN = 16  # of the context; texts in a natural language have 1 to 6


@dataclass(frozen=True)
class Limits:
    """Limits on one request."""

    context: int  # tokens of prompt and answer together
    most_tokens: int  # of an answer
    body: int = 2**20  # bytes
    timeout: float = 600.0  # seconds from arrival to the end
    body_timeout: float = 30.0  # seconds in which a body must come in
    most_characters: int | None = None  # of a prompt; None: CHARACTERS_PER_TOKEN for each token of the context

    @property
    def characters(self) -> int:
        return self.context * CHARACTERS_PER_TOKEN if self.most_characters is None else self.most_characters


class Admission:
    """Reads requests at bounded memory, outside of the thread that decodes.

    Bodies up to SMALL bytes are read at once. Of larger ones LARGE_AT_A_TIME are in memory, and the others stay in
    their sockets. A prompt of too many characters is refused before it becomes tokens. One thread makes tokens of
    large prompts, another one of small ones.
    """

    def __init__(self, tokenizer: "PreTrainedTokenizerFast", model: str, limits: Limits):
        self.tokenizer, self.model, self.limits = tokenizer, model, limits
        self.special = special_tokens(tokenizer)
        self.prefix = document_prefix(tokenizer)
        # what a tokenizer's file may ask for; changed here only, because threads that encode borrow the tokenizer
        tokenizer.backend_tokenizer.no_truncation()
        tokenizer.backend_tokenizer.no_padding()
        self._large = asyncio.Semaphore(LARGE_AT_A_TIME)
        self._open: set[asyncio.Timeout] = set()
        self._is_closing = False
        self._threads = {
            is_large: ThreadPoolExecutor(1, thread_name_prefix="retention-gates-tokens") for is_large in (False, True)
        }

    def interrupt(self) -> None:
        """Refuses, from now on, what is still being read: the server shuts down."""
        self._is_closing = True
        for timeout in self._open:
            timeout.reschedule(0)

    def close(self) -> None:
        for thread in self._threads.values():
            thread.shutdown(cancel_futures=True)

    async def read(self, request: "Request", *, is_chat: bool) -> tuple["array[int]", Wish]:
        """The prompt's tokens, and the wish without its text.

        Raises:
            Refused: with what is wrong with the request, or if it takes too long.
        """
        async with self._limit(self.limits.timeout), self._body(request) as body:
            wish = read_wish(parsed(body), is_chat=is_chat, model=self.model, most_tokens=self.limits.most_tokens)
            body.clear()
            self._check_stops(wish.sampling.stop)
            characters = wish.characters
            self._check_characters(wish, characters)
            thread = self._threads[characters > SMALL]
            ids = await asyncio.get_running_loop().run_in_executor(thread, self._token_ids, wish)
        fitted = self._fitted(wish, len(ids))
        return ids, replace(fitted, messages=None, prompt=None)

    @asynccontextmanager
    async def _body(self, request: "Request") -> AsyncIterator[bytearray]:
        """The whole body; inside the block it is one of the few large ones, if it is large."""
        limit = self.limits.body
        length = request.headers.get("content-length", "0")
        if length.isdigit() and (len(length) > 20 or int(length) > limit):
            raise _too_large(limit)
        body, parts = bytearray(), request.stream()
        async with self._limit(self.limits.body_timeout):
            is_whole = await _append(body, parts, min(SMALL, limit))
        if is_whole:
            yield body
            return
        async with self._large:
            async with self._limit(self.limits.body_timeout):
                is_whole = await _append(body, parts, limit)
            if not is_whole:
                raise _too_large(limit)
            yield body

    @asynccontextmanager
    async def _limit(self, seconds: float) -> AsyncIterator[None]:
        try:
            async with asyncio.timeout(seconds) as timeout:
                self._open.add(timeout)
                try:
                    yield
                finally:
                    self._open.discard(timeout)
        except TimeoutError:
            if self._is_closing:
                raise shutting_down() from None
            raise Refused(408, f"The request was not complete after {seconds:g} s.", code="timeout") from None

    def _check_characters(self, wish: Wish, characters: int) -> None:
        what, most = ("characters", self.limits.characters)
        if isinstance(wish.prompt, list):
            what, most = "tokens", self.limits.context
        if characters > most:
            raise Refused(
                400,
                f"The prompt has {characters} {what}, and this server takes at most {most}: its context has "
                f"{self.limits.context} tokens.",
                code="context_length_exceeded",
                param=wish.where,
            )

    def _check_stops(self, stop: tuple[str, ...]) -> None:
        for one in stop:
            inside = next((token for token in self.special if token in one and token != one), None)
            if inside is not None and one not in self.special:
                raise bad("stop", f"stop={one!r} has {inside!r}, a special token, which is no text: name it alone.")

    def _token_ids(self, wish: Wish) -> "array[int]":
        tokenizer = self.tokenizer
        if isinstance(wish.prompt, list):
            ids = wish.prompt
            if not all(0 <= token < len(tokenizer) for token in ids):
                raise bad("prompt", f"prompt has token ids outside 0 to {len(tokenizer) - 1}.")
        elif wish.prompt is not None:
            ids = self.prefix + self._encoded(wish.prompt)
        else:
            assert wish.messages is not None
            if not tokenizer.chat_template:
                raise bad("messages", "The model's tokenizer has no chat template: use /v1/completions.")
            try:
                text = tokenizer.apply_chat_template(wish.messages, add_generation_prompt=True, tokenize=False)
            except Exception as error:  # templates raise what they like, about the order of roles say
                raise bad("messages", f"The model's chat template refuses the messages: {error}") from None
            self._check_characters(wish, len(str(text)))  # of many short messages, too
            ids = self._encoded(str(text))
        if not ids:
            raise bad(wish.where, "The prompt has no tokens.")
        return array("i", ids)

    def _encoded(self, text: str) -> list[int]:
        # encode() holds Python's lock, seconds for a megabyte, and places of characters that nobody wants
        (encoding,) = self.tokenizer.backend_tokenizer.encode_batch_fast([text], add_special_tokens=False)
        ids: list[int] = encoding.ids
        return ids

    def _fitted(self, wish: Wish, prompt: int) -> Wish:
        """The wish with an answer that fits into the model's context beside a prompt of so many tokens."""
        room = self.limits.context - prompt
        if room >= wish.sampling.max_tokens:
            return wish
        if room < 1 or wish.has_own_length:
            asked = f" and {wish.sampling.max_tokens} for the answer" if wish.has_own_length else ""
            raise Refused(
                400,
                f"The context has {self.limits.context} tokens, and the request wants {prompt} for the prompt{asked}.",
                code="context_length_exceeded",
                param=wish.where,
            )
        return replace(wish, sampling=replace(wish.sampling, max_tokens=room))


def parsed(body: bytes | bytearray) -> Any:
    """The JSON of a body.

    Raises:
        Refused: 400 if it is none, or has half a surrogate pair, which no text can hold.
    """
    try:
        data = json.loads(body.decode())
        if b"\\u" in body:  # the only way into a text that was UTF-8
            json.dumps(data, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        half = ascii(error.object[error.start])
        raise Refused(
            400, f"The body has {half}, half a surrogate pair, which is no character.", code="invalid_json"
        ) from None
    except (ValueError, RecursionError) as error:
        raise Refused(400, f"The body is not JSON: {error}", code="invalid_json") from None
    return data


async def _append(body: bytearray, parts: AsyncIterator[bytes], limit: int) -> bool:
    """Reads on up to the limit or a part beyond it; gives whether the body is whole and not above it."""
    from starlette.requests import ClientDisconnect

    try:
        while len(body) <= limit:
            body += await anext(parts)
    except StopAsyncIteration:
        return True
    except ClientDisconnect:
        raise Refused(400, "The client has left.", code="disconnected") from None
    return False


def _too_large(limit: int) -> Refused:
    return Refused(413, f"The body is larger than {limit} bytes.", code="body_too_large")
