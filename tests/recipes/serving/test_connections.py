"""Connections that say nothing, too little or too much, and more of them than the process can have."""

import asyncio
import contextlib
import http.client
import re
import socket
import subprocess
import sys
import threading
import time

import pytest

pytest.importorskip("uvicorn", reason="needs the extra serve")
from retention_gates.recipes.serving.connections import (
    GuardedServer,
    connections_and_backlog,
    guarded_config,
)

SERVER = """
from retention_gates.recipes.serving.connections import GuardedServer, guarded_config

async def app(scope, receive, send):
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"2")]})
    await send({"type": "http.response.body", "body": b"ok"})

GuardedServer(guarded_config(app, port=0, lifespan="off", header_timeout=60)).run()
"""


async def app(scope, receive, send):
    """Answers with megabytes to /large, after a second to /slow, and else at once."""
    if scope["path"] == "/slow":
        await asyncio.sleep(1.0)
    body = b"x" * (2**24 if scope["path"] == "/large" else 2)
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"%d" % len(body))]})
    await send({"type": "http.response.body", "body": body})


@contextlib.contextmanager
def serving(**limits):
    """The port of a server with these limits, and the connections it has."""
    config = guarded_config(app, port=0, lifespan="off", log_level="error", **limits)
    server = GuardedServer(config)
    thread = threading.Thread(target=server.run)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    try:
        yield server.servers[0].sockets[0].getsockname()[1], server.server_state.connections
    finally:
        server.should_exit = True
        thread.join()


def connect(port):
    return socket.create_connection(("127.0.0.1", port), timeout=10)


def status(port, path="/"):
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
    with contextlib.closing(connection):
        connection.request("GET", path)
        return connection.getresponse().status


def seconds_until_closed(line, send=b""):
    """How long the server keeps the connection, which gets these bytes again and again."""
    began = time.monotonic()
    line.settimeout(0.05)
    while time.monotonic() - began < 8:
        try:
            line.sendall(send)
            if line.recv(1000) == b"":
                break
        except TimeoutError:
            continue
        except OSError:
            break
    return time.monotonic() - began


@pytest.mark.parametrize("first, then", [(b"", b""), (b"GET / HT", b""), (b"GET / HTTP/1.1\r\n", b"x: y\r\n")])
def test_headers_that_do_not_end_end_the_connection(first, then):
    with serving(header_timeout=0.5) as (port, _), connect(port) as line:
        line.sendall(first)
        assert 0.4 < seconds_until_closed(line, then) < 2


def test_the_next_request_of_a_connection_has_the_same_limit():
    with serving(header_timeout=0.5, idle_timeout=20) as (port, _), connect(port) as line:
        for _ in range(2):
            line.sendall(b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n")
            answer = b""
            while not answer.endswith(b"xx"):
                answer += line.recv(1000)
            assert answer.startswith(b"HTTP/1.1 200")
            time.sleep(0.7)  # silence has the longer limit
        assert 0.4 < seconds_until_closed(line, b"G") < 2


def test_a_request_under_way_has_no_such_limit_and_silence_has_its_own():
    with serving(header_timeout=0.3, idle_timeout=1) as (port, connections), connect(port) as line:
        line.sendall(b"GET /slow HTTP/1.1\r\nHost: localhost\r\n\r\n")
        assert line.recv(1000).startswith(b"HTTP/1.1 200")
        assert 0.5 < seconds_until_closed(line) < 3
        time.sleep(0.1)
        assert not connections


def test_a_client_that_does_not_read_is_let_go():
    with serving(write_timeout=0.5) as (port, connections), connect(port) as line:
        line.sendall(b"GET /large HTTP/1.1\r\nHost: localhost\r\n\r\n")
        time.sleep(0.2)
        assert len(connections) == 1
        time.sleep(1.0)
        assert not connections


def test_headers_that_are_too_large_are_refused():
    with serving() as (port, _), connect(port) as line:
        line.sendall(b"GET / HTTP/1.1\r\nHost: localhost\r\nx: " + b"y" * 2**17 + b"\r\n\r\n")
        assert line.recv(1000).startswith(b"HTTP/1.1 400")


def test_of_too_many_the_most_silent_goes_and_no_request_under_way():
    with serving(max_connections=4) as (port, connections), contextlib.ExitStack() as stack:
        busy = [stack.enter_context(connect(port)) for _ in range(3)]
        for line in busy:
            line.sendall(b"GET /slow HTTP/1.1\r\nHost: localhost\r\n\r\n")
        time.sleep(0.2)
        silent = stack.enter_context(connect(port))
        time.sleep(0.2)
        assert status(port) == 200
        assert seconds_until_closed(silent) < 0.5
        busy.append(stack.enter_context(connect(port)))
        busy[3].sendall(b"GET /slow HTTP/1.1\r\nHost: localhost\r\n\r\n")
        time.sleep(0.2)
        refused = stack.enter_context(connect(port)).recv(1000)
        assert refused.startswith(b"HTTP/1.1 503") and b'"code": "server_busy"' in refused
        assert [line.recv(1000)[:12] for line in busy] == [b"HTTP/1.1 200"] * 4
        assert status(port) == 200 and len(connections) <= 4


def test_four_hundred_half_open_connections_and_few_files(tmp_path):
    """Health is answered beside them, and the log says nothing of files that ran out."""
    log = tmp_path / "log"
    command = ["bash", "-c", f"ulimit -n 256; exec {sys.executable} -c '{SERVER}' 2> {log}"]
    process = subprocess.Popen(command)
    try:
        deadline = time.monotonic() + 60
        while not (found := re.search(r"running on http://127.0.0.1:(\d+)", log.read_text() if log.exists() else "")):
            assert time.monotonic() < deadline and process.poll() is None
            time.sleep(0.05)
        port = int(found[1])
        with contextlib.ExitStack() as stack:
            for number in range(400):
                line = stack.enter_context(connect(port))
                line.sendall(b"GET / HTTP/1.1\r\n")
                if number % 50 == 49:
                    assert status(port) == 200
            assert [status(port) for _ in range(20)] == [200] * 20
    finally:
        process.terminate()
        process.wait(10)
    assert log.stat().st_size < 10_000 and "Traceback" not in log.read_text()


def test_more_connections_than_files_are_refused_with_what_would_do():
    most, backlog = connections_and_backlog()
    assert most >= 1 and backlog >= 4
    with pytest.raises(ValueError, match=r"--max-connections 10000000000 needs more open files .* ask for up to \d+"):
        connections_and_backlog(10**10)
