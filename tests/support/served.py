"""An endpoint in this process, on a free port of the loopback interface, and a client without a library."""

import contextlib
import http.client
import json
import socket
import threading
import time
from dataclasses import dataclass
from typing import Any

from tiny_adapter import Files

TEMPLATE = (
    "{% for m in messages %}{% if m['role'] == 'system' and not loop.first %}{{ raise_exception('system first') }}"
    "{% endif %}{{ m['content'] }} {% endfor %}"
)


@dataclass
class Reply:
    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def events(self) -> list[Any]:
        """The server-sent events, of which the last is [DONE] unless something failed."""
        lines = [line.removeprefix("data: ") for line in self.body.decode().split("\n\n") if line]
        return [line if line == "[DONE]" else json.loads(line) for line in lines]


class Client:
    server: Any = None  # behind it, if it is in this process, and its thread
    thread: Any = None

    def __init__(self, port: int):
        self.port = port

    def open(self, method: str, path: str, body: Any = None, **headers: str) -> http.client.HTTPConnection:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=120)
        data = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
        if data is not None:
            headers = {"Content-Type": "application/json"} | headers
        connection.request(method, path, data, headers)
        return connection

    def ask(self, path: str, body: Any = None, **headers: str) -> Reply:
        connection = self.open(headers.pop("method", "GET" if body is None else "POST"), path, body, **headers)
        with contextlib.closing(connection):
            response = connection.getresponse()
            return Reply(response.status, dict(response.getheaders()), response.read())


@contextlib.contextmanager
def started(client, length, sent):
    """A request of which so many bytes have come, and no more do."""
    with socket.create_connection(("127.0.0.1", client.port), timeout=30) as line:
        head = "POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        line.sendall(f"{head}Content-Length: {length}\r\n\r\n".encode() + b" " * sent)
        yield line


@contextlib.contextmanager
def served(
    files: Files,
    *,
    rows: int,
    memory_size: int = 8,
    most_waiting: int = 300,
    shutdown_timeout: float = 10.0,
    rules: Any = None,
    **limits: Any,
):
    """Gives a client and the engine behind the endpoint."""
    from retention_gates.recipes.loading.models import load_model, load_tokenizer
    from retention_gates.recipes.serving.access import Rules
    from retention_gates.recipes.serving.admission import Admission, Limits
    from retention_gates.recipes.serving.engine import Engine
    from retention_gates.recipes.serving.rows import ChatRows
    from retention_gates.recipes.serving.server import make_server

    tokenizer = load_tokenizer(str(files.model))
    tokenizer.chat_template = TEMPLATE
    model = load_model(None, str(files.adapter))
    chat_rows = ChatRows(model, memory_size, rows=rows, chunk_size=16)
    engine = Engine(chat_rows, rows, tokenizer, eos=set(), most_waiting=most_waiting)
    admission = Admission(tokenizer, "tiny", Limits(chat_rows.context, **({"most_tokens": 100} | limits)))
    options = {"shutdown_timeout": shutdown_timeout, "rules": rules or Rules(), "log_level": "warning"}
    server = make_server(engine, admission, host="127.0.0.1", port=0, **options)
    thread = threading.Thread(target=server.run)
    thread.start()
    while not server.started:
        assert thread.is_alive()
        time.sleep(0.01)
    try:
        client = Client(server.servers[0].sockets[0].getsockname()[1])
        client.server, client.thread = server, thread
        yield client, engine
    finally:
        server.should_exit = True
        thread.join()
