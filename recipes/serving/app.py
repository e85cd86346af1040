"""The HTTP side: routes, limits, streams, and what happens when a client leaves."""

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from transformers import PreTrainedTokenizerFast

from retention_gates.data.tokens import document_prefix
from retention_gates.recipes.serving.chat import Chat, Ended, Refused
from retention_gates.recipes.serving.engine import Engine
from retention_gates.recipes.serving.metrics import metrics_text
from retention_gates.recipes.serving.protocol import Wish, bad, read_wish
from retention_gates.recipes.serving.responses import Form, error_object, event

if TYPE_CHECKING:  # of the extra "serve"
    from fastapi import FastAPI
    from starlette.requests import Request


@dataclass(frozen=True)
class Limits:
    """What a request may take."""

    context: int  # tokens of prompt and answer together
    most_tokens: int  # of an answer
    body: int = 2**20  # bytes
    timeout: float = 600.0  # seconds from arrival to the end


def build_app(engine: Engine, tokenizer: "PreTrainedTokenizerFast", model: str, limits: Limits) -> "FastAPI":
    """The application; it starts the engine and, when it ends, closes it."""
    from fastapi import FastAPI
    from starlette.concurrency import run_in_threadpool
    from starlette.exceptions import HTTPException
    from starlette.requests import Request
    from starlette.responses import JSONResponse, Response, StreamingResponse

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        engine.start()
        yield
        await run_in_threadpool(engine.close)

    app = FastAPI(title="retention-gates", lifespan=lifespan, docs_url=None, redoc_url=None, openapi_url=None)

    @app.exception_handler(Refused)
    async def refuse(_: Request, error: Refused) -> Response:
        headers = {} if error.retry_after is None else {"Retry-After": str(error.retry_after)}
        return JSONResponse(error_object(error), status_code=error.status, headers=headers)

    @app.exception_handler(HTTPException)
    async def refuse_route(request: Request, error: HTTPException) -> Response:
        message = f"{error.detail}: {request.method} {request.url.path}"
        return await refuse(request, Refused(error.status_code, message, code="unknown_url"))

    @app.exception_handler(Exception)
    async def fail(_: Request, error: Exception) -> Response:  # the traceback goes to the log
        return await refuse(_, Refused(500, f"The server failed: {type(error).__name__}.", code="server_error"))

    async def answer(request: Request, *, is_chat: bool) -> Response:
        async with _limit(limits.timeout):
            body = await _read_body(request, limits.body)
            wish = read_wish(body, is_chat=is_chat, model=model, most_tokens=limits.most_tokens)
            ids = await run_in_threadpool(_token_ids, tokenizer, wish)
        chat = ServedChat(ids, _fitted(wish, len(ids), limits), engine, limits.timeout)
        engine.submit(chat.chat)
        watcher = asyncio.create_task(chat.watch(request))
        try:
            # until the first word the status is open: what fails so early fails with a status of its own
            text = await chat.text_until(first_only=wish.is_streamed)
        except BaseException:
            watcher.cancel()
            chat.leave()
            raise
        form = Form(model, is_chat=is_chat)
        if not wish.is_streamed:
            watcher.cancel()
            assert chat.ended is not None
            return JSONResponse(form.whole(text, chat.ended))
        headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
        events = chat.stream(form, text, watcher)
        return StreamingResponse(events, media_type="text/event-stream", headers=headers)

    @app.post("/v1/chat/completions")
    async def chat_completions(request: Request) -> Response:
        return await answer(request, is_chat=True)

    @app.post("/v1/completions")
    async def completions(request: Request) -> Response:
        return await answer(request, is_chat=False)

    @app.get("/v1/models")
    async def models() -> Response:
        one = {"id": model, "object": "model", "created": 0, "owned_by": "retention-gates"}
        return JSONResponse({"object": "list", "data": [one]})

    @app.get("/health")
    async def health() -> Response:
        state = {"status": "ok" if engine.is_healthy else "failing", "running": engine.active}
        state |= {"waiting": len(engine.waiting), "rows": len(engine.running)}
        return JSONResponse(state, status_code=200 if engine.is_healthy else 503)

    @app.get("/metrics")
    async def metrics() -> Response:
        content, kind = metrics_text(engine)
        return Response(content, headers={"Content-Type": kind})

    return app


class ServedChat:
    """A chat in the engine and the client that waits for it."""

    def __init__(self, ids: list[int], wish: Wish, engine: Engine, timeout: float):
        loop = asyncio.get_running_loop()
        self.events: asyncio.Queue[str | Ended] = asyncio.Queue()
        self.wish, self.engine = wish, engine
        self.ended: Ended | None = None

        def deliver(one: str | Ended) -> None:  # in the engine's thread
            loop.call_soon_threadsafe(self.events.put_nowait, one)

        self.chat = Chat(ids, wish.sampling, deliver, timeout=timeout)

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

    async def stream(self, form: Form, text: str, watcher: "asyncio.Task[None]") -> AsyncIterator[str]:
        """The answer as server-sent events, from its first piece on."""
        try:
            yield event(form.piece(text, is_first=True))
            while self.ended is None:
                one = await self.events.get()
                if isinstance(one, Ended):
                    self.ended = one
                else:
                    yield event(form.piece(one))
            if self.ended.error is not None:
                yield event(error_object(self.ended.error))
                return
            yield event(form.piece(None, self.ended.reason))
            if self.wish.wants_usage:
                yield event(form.last(self.ended))
            yield event("[DONE]")
        finally:  # also if the client has left
            watcher.cancel()
            self.leave()


@asynccontextmanager
async def _limit(seconds: float) -> AsyncIterator[None]:
    try:
        async with asyncio.timeout(seconds):
            yield
    except TimeoutError:
        raise Refused(408, f"The request was not complete after {seconds:g} s.", code="timeout") from None


async def _read_body(request: "Request", limit: int) -> Any:
    from starlette.requests import ClientDisconnect

    too_large = Refused(413, f"The body is larger than {limit} bytes.", code="body_too_large")
    length = request.headers.get("content-length", "0")
    if length.isdigit() and int(length) > limit:
        raise too_large
    body = bytearray()
    try:
        async for part in request.stream():
            body += part
            if len(body) > limit:
                raise too_large
    except ClientDisconnect:
        raise Refused(400, "The client has left.", code="disconnected") from None
    try:
        return json.loads(body)
    except (ValueError, RecursionError) as error:
        raise Refused(400, f"The body is not JSON: {error}", code="invalid_json") from None


def _token_ids(tokenizer: "PreTrainedTokenizerFast", wish: Wish) -> list[int]:
    if wish.messages is not None:
        if not tokenizer.chat_template:
            raise bad("messages", "The model's tokenizer has no chat template: use /v1/completions.")
        try:
            text = tokenizer.apply_chat_template(wish.messages, add_generation_prompt=True, tokenize=False)
        except Exception as error:  # templates raise what they like, about the order of roles say
            raise bad("messages", f"The model's chat template refuses the messages: {error}") from None
        ids = tokenizer.encode(str(text), add_special_tokens=False)
    elif isinstance(wish.prompt, str):
        ids = document_prefix(tokenizer) + tokenizer.encode(wish.prompt, add_special_tokens=False)
    else:
        assert wish.prompt is not None
        ids = wish.prompt
        if not all(0 <= token < len(tokenizer) for token in ids):
            raise bad("prompt", f"prompt has token ids outside 0 to {len(tokenizer) - 1}.")
    if not ids:
        raise bad("messages" if wish.prompt is None else "prompt", "The prompt has no tokens.")
    return ids


def _fitted(wish: Wish, prompt: int, limits: Limits) -> Wish:
    """The wish with an answer that fits into the model's context beside a prompt of so many tokens."""
    room = limits.context - prompt
    if room >= wish.sampling.max_tokens:
        return wish
    if room < 1 or wish.has_own_length:
        asked = f" and {wish.sampling.max_tokens} for the answer" if wish.has_own_length else ""
        raise Refused(
            400,
            f"The context has {limits.context} tokens, and the request wants {prompt} for the prompt{asked}.",
            code="context_length_exceeded",
            param="messages" if wish.prompt is None else "prompt",
        )
    return replace(wish, sampling=replace(wish.sampling, max_tokens=room))
