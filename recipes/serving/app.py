"""The HTTP side: routes, and errors in the API's form."""

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

from retention_gates.recipes.serving.access import Access, Rules
from retention_gates.recipes.serving.admission import Admission
from retention_gates.recipes.serving.chat import Refused
from retention_gates.recipes.serving.engine import Engine
from retention_gates.recipes.serving.metrics import metrics_text
from retention_gates.recipes.serving.protocol import check_model
from retention_gates.recipes.serving.responses import Form, error_object
from retention_gates.recipes.serving.served_chat import ServedChat

READ = ["GET", "HEAD"]

if TYPE_CHECKING:  # of the extra "serve"
    from fastapi import FastAPI


def build_app(engine: Engine, admission: Admission, rules: Rules) -> "FastAPI":
    """The application; it starts the engine and, when it ends, closes it."""
    from fastapi import FastAPI
    from fastapi.middleware.cors import CORSMiddleware
    from starlette.concurrency import run_in_threadpool
    from starlette.exceptions import HTTPException
    from starlette.requests import Request
    from starlette.responses import JSONResponse, Response, StreamingResponse

    model, limits = admission.model, admission.limits

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        engine.start()
        yield
        await run_in_threadpool(engine.close)
        admission.close()

    app = FastAPI(title="retention-gates", lifespan=lifespan, docs_url=None, redoc_url=None, openapi_url=None)

    app.add_middleware(Access, rules=rules)
    if rules.origins:  # outside of it, so that pages can read what is refused
        app.add_middleware(
            CORSMiddleware,
            allow_origins=rules.origins,
            allow_methods=["GET", "POST"],
            allow_headers=["Authorization", "Content-Type"],
        )

    @app.exception_handler(Refused)
    async def refuse(_: Request, error: Refused) -> Response:
        headers = {} if error.retry_after is None else {"Retry-After": str(error.retry_after)}
        return JSONResponse(error_object(error), status_code=error.status, headers=headers)

    @app.exception_handler(HTTPException)
    async def refuse_route(request: Request, error: HTTPException) -> Response:
        message = f"{error.detail}: {request.method} {request.url.path}"
        code = "method_not_allowed" if error.status_code == 405 else "unknown_url"
        answer = await refuse(request, Refused(error.status_code, message, code=code))
        answer.headers.update(error.headers or {})
        return answer

    @app.exception_handler(Exception)
    async def fail(_: Request, error: Exception) -> Response:  # the traceback goes to the log
        return await refuse(_, Refused(500, f"The server failed: {type(error).__name__}.", code="server_error"))

    async def answer(request: Request, *, is_chat: bool) -> Response:
        arrived = time.monotonic()
        with engine.admitted() as hand_over:
            ids, wish = await admission.read(request, is_chat=is_chat)
            chat = ServedChat(ids, wish, engine, limits.timeout - (time.monotonic() - arrived))
            hand_over(chat.chat)
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

    card = {"id": model, "object": "model", "created": int(time.time()), "owned_by": "retention-gates"}

    @app.api_route("/v1/models", methods=READ)
    async def models() -> Response:
        return JSONResponse({"object": "list", "data": [card]})

    @app.api_route("/v1/models/{name:path}", methods=READ)
    async def one_model(name: str) -> Response:
        check_model(name, model)
        return JSONResponse(card)

    @app.api_route("/health", methods=READ)
    async def health() -> Response:
        status = "stopping" if engine.is_draining else "ok" if engine.is_healthy else "failing"
        state = {"status": status, "running": engine.active}
        state |= {"waiting": engine.pending, "rows": len(engine.running)}
        return JSONResponse(state, status_code=200 if engine.is_healthy else 503)

    @app.api_route("/metrics", methods=READ)
    async def metrics() -> Response:
        content, kind = metrics_text(engine)
        return Response(content, headers={"Content-Type": kind})

    return app
