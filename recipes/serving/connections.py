"""Connections, as few and as short as a process can have: limits for headers, silence, and their number.

uvicorn limits the size of headers and how long a connection may be silent after an answer. It waits for ever for
headers that do not come, and for clients that do not read, and it counts connections only when a request is complete.
"""

import asyncio
import json
import logging
import os
import socket
from typing import Any

import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

try:
    import resource
except ImportError:  # Windows, which has no such limit
    resource = None  # type: ignore[assignment]

USUAL = 1024  # connections, if nothing else is asked for
SPARE_FILES = 32  # what else a running server opens
TICKS = 4  # rounds of the event loop between accept() and the end of a connection that is turned away
HEADER_BYTES = 2**15
QUEUE = 2048  # connections that the system holds for us

logger = logging.getLogger("uvicorn.error")


def connections_and_backlog(asked: int | None = None) -> tuple[int, int]:
    """Connections that the process can have, and how many may be taken at once, by its limit of open files.

    The limit is raised as far as it can be, if that is needed.

    Raises:
        ValueError: if more are asked for than there can be.
    """
    wanted = USUAL if asked is None else asked
    if resource is None:
        return wanted, 128
    used = len(os.listdir("/dev/fd")) + SPARE_FILES
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    needed = used + wanted + TICKS * 128
    if soft != resource.RLIM_INFINITY and soft < needed:
        soft = needed if hard == resource.RLIM_INFINITY else min(needed, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    room = needed - used if soft == resource.RLIM_INFINITY else soft - used
    backlog = min(128, max(4, room // 16))
    most = room - TICKS * backlog
    if most < (1 if asked is None else asked):
        raise ValueError(
            f"--max-connections {wanted} needs more open files than the {soft} that this process may have, of which "
            f"{used + TICKS * backlog} are for other ends: raise the limit with ulimit -n, or ask for up to {most}."
        )
    return min(wanted, most), backlog


class GuardedProtocol(H11Protocol):
    """A connection that ends if headers do not come, or nobody reads, in time; of too many, the most silent one."""

    most: int  # connections at a time
    header_timeout: float  # seconds from the first byte that may come to the end of the headers
    write_timeout: float  # seconds in which a client must take something of what waits for it

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self._late: asyncio.TimerHandle | None = None
        self._stuck: asyncio.TimerHandle | None = None
        self.heard = self.loop.time()
        if len(self.connections) > self.most and not self._make_room():
            self._turn_away()
            return
        self._watch()

    def connection_lost(self, exc: Exception | None) -> None:
        for timer in (self._late, self._stuck):
            if timer is not None:
                timer.cancel()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if self.transport.is_closing():
            return
        self.heard = self.loop.time()
        super().data_received(data)
        self._watch()

    def pause_writing(self) -> None:
        super().pause_writing()
        self._stuck = self.loop.call_later(self.write_timeout, self.transport.abort)

    def resume_writing(self) -> None:
        super().resume_writing()
        if self._stuck is not None:
            self._stuck.cancel()

    @property
    def is_idle(self) -> bool:
        """Whether no request is under way."""
        return self.cycle is None or self.cycle.response_complete

    def _watch(self) -> None:
        if not self.is_idle:
            if self._late is not None:
                self._late.cancel()
            self._late = None
        elif self._late is None:
            self._late = self.loop.call_later(self.header_timeout, self._end_if_idle)

    def _end_if_idle(self) -> None:
        self._late = None
        if self.is_idle:
            self.transport.abort()

    def _make_room(self) -> bool:
        """Ends the connection without a request that has been silent for longest; gives whether there was one."""
        others = [one for one in self.connections if one is not self and not one.transport.is_closing()]
        idle = [one for one in others if isinstance(one, GuardedProtocol) and one.is_idle]
        if not idle:
            return len(others) < self.most
        min(idle, key=lambda one: one.heard).transport.abort()
        return True

    def _turn_away(self) -> None:
        error = {"message": f"All {self.most} connections are in use.", "type": "server_error"}
        body = json.dumps({"error": {**error, "param": None, "code": "server_busy"}})
        head = "HTTP/1.1 503 Service Unavailable\r\ncontent-type: application/json\r\nretry-after: 5\r\n"
        self.transport.write(f"{head}connection: close\r\ncontent-length: {len(body)}\r\n\r\n{body}".encode())
        self.transport.close()


class GuardedServer(uvicorn.Server):
    """Takes few connections at once and lets many wait for that, in the system's queue."""

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        for listener in (each for server in self.servers for each in server.sockets):
            with socket.socket(fileno=os.dup(listener.fileno())) as same:
                same.listen(QUEUE)


def guarded_config(
    app: Any,
    *,
    max_connections: int | None = None,
    header_timeout: float = 10.0,
    idle_timeout: int = 30,
    write_timeout: float = 60.0,
    **options: Any,
) -> uvicorn.Config:
    """uvicorn's settings for an application whose connections are limited.

    Args:
        idle_timeout: seconds of silence after an answer.
        options: of uvicorn.Config.

    Raises:
        ValueError: if the process cannot have so many connections.
    """
    most, backlog = connections_and_backlog(max_connections)
    limits = {"most": most, "header_timeout": header_timeout, "write_timeout": write_timeout}
    return uvicorn.Config(
        app,
        http=type("Protocol", (GuardedProtocol,), limits),
        ws="none",
        backlog=backlog,
        timeout_keep_alive=idle_timeout,
        h11_max_incomplete_event_size=HEADER_BYTES,
        **options,
    )
