"""The server around the application: uvicorn, with a shutdown that cuts nobody off without a word."""

import asyncio
import logging
import socket
import time
from typing import Any

import uvicorn

from retention_gates.recipes.serving.access import Rules
from retention_gates.recipes.serving.admission import Admission
from retention_gates.recipes.serving.app import build_app
from retention_gates.recipes.serving.connections import GuardedServer, guarded_config
from retention_gates.recipes.serving.engine import Engine

LAST_WORDS = 3  # seconds in which clients take what was still written to them

logger = logging.getLogger("uvicorn.error")


class Server(GuardedServer):
    """Serves until a signal comes.

    Then /health is 503 and requests are refused, those that wait too, while chats that run go on for up to
    `shutdown_timeout` seconds. Those that are not through get an error, and only then the sockets close. A second
    ctrl-C doesn't wait.
    """

    def __init__(self, config: uvicorn.Config, engine: Engine, admission: Admission, shutdown_timeout: float):
        super().__init__(config)
        self.engine, self.admission, self.shutdown_timeout = engine, admission, shutdown_timeout

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        self.engine.drain()
        until = time.monotonic() + self.shutdown_timeout
        if running := self.engine.unfinished:
            logger.info("%d chats go on for up to %g s", running, self.shutdown_timeout)
        while self.engine.unfinished and time.monotonic() < until and not self.force_exit:
            await asyncio.sleep(0.02)
        self.admission.interrupt()
        await asyncio.get_running_loop().run_in_executor(None, self.engine.close)
        await super().shutdown(sockets)


def make_server(
    engine: Engine,
    admission: Admission,
    *,
    host: str,
    port: int,
    shutdown_timeout: float,
    rules: Rules,
    **options: Any,
) -> Server:
    """A server that is ready to run; `options` are those of `guarded_config`."""
    config = guarded_config(
        build_app(engine, admission, rules), host=host, port=port, timeout_graceful_shutdown=LAST_WORDS, **options
    )
    return Server(config, engine, admission, shutdown_timeout)
