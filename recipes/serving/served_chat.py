"""A chat in the engine and the client that waits for it."""

import asyncio
from collections.abc import AsyncIterator, Sequence
from typing import TYPE_CHECKING

from retention_gates.recipes.serving.chat import Chat, Ended
from retention_gates.recipes.serving.engine import Engine
from retention_gates.recipes.serving.protocol import Wish
from retention_gates.recipes.serving.responses import Form, error_object, event

if TYPE_CHECKING:  # of the extra "serve"
    from starlette.requests import Request


class ServedChat:
    """Takes what the engine delivers, in its thread, over to the client's task."""

    def __init__(self, ids: Sequence[int], wish: Wish, engine: Engine, timeout: float):
        loop = asyncio.get_running_loop()
        self.events: asyncio.Queue[str | Ended] = asyncio.Queue()
        self.wish, self.engine = wish, engine
        self.ended: Ended | None = None

        def deliver(one: str | Ended) -> None:  # in the engine's thread
            loop.call_soon_threadsafe(self.events.put_nowait, one)

        self.chat = Chat(ids, wish.sampling, deliver, timeout=timeout, is_continuation=not wish.is_chat)

    async def watch(self, request: "Request") -> None:
        """Ends the chat when the client leaves."""
        while (await request.receive())["type"] != "http.disconnect":
            pass
        self.leave()

    def leave(self) -> None:
        if self.ended is None:
            self.engine.cancel(self.chat)

    async def text_until(self, *, first_only: bool) -> str:
        """All of the answer, or its first piece.

        Raises:
            Refused: if the chat ends with an error.
        """
        text = ""
        while self.ended is None and not (first_only and text):
            one = await self.events.get()
            if isinstance(one, Ended):
                self.ended = one
            else:
                text += one
        if self.ended is not None and self.ended.error is not None:
            raise self.ended.error
        return text

    async def _news(self) -> str:
        """Gives the pieces that have come since: more than one piece, where clients are many and steps short."""
        text, one = "", await self.events.get()
        while not isinstance(one, Ended):
            text += one
            if self.events.empty():
                return text
            one = self.events.get_nowait()
        self.ended = one
        return text

    async def stream(self, form: Form, text: str, watcher: "asyncio.Task[None]") -> AsyncIterator[str]:
        """The answer as server-sent events, from its first piece on."""
        try:
            yield event(form.piece(text, is_first=True))
            while self.ended is None:
                if text := await self._news():
                    yield event(form.piece(text))
            if self.ended.error is not None:
                yield event(error_object(self.ended.error))
            else:
                yield event(form.piece(None, self.ended.reason))
                if self.wish.wants_usage:
                    yield event(form.last(self.ended))
            yield event("[DONE]")
        finally:  # also if the client has left
            watcher.cancel()
            self.leave()
