"""What becomes of those in the house when the server is told to stop."""

import json
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from served import served, started
from tiny_adapter import make_files
from waiting import wait_for

pytest.importorskip("fastapi", reason="needs the extra serve")
TEXT = "/v1/completions"
LONG = {"prompt": "king", "temperature": 0, "max_tokens": 100}


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    return make_files(tmp_path_factory.mktemp("shutdown"))


def slow_down(engine, monkeypatch, seconds):
    step = engine.rows.step
    monkeypatch.setattr(engine.rows, "step", lambda *arguments: time.sleep(seconds) or step(*arguments))


def test_readiness_goes_first_and_what_runs_is_finished(files, monkeypatch):
    with served(files, rows=2, shutdown_timeout=30) as (client, engine), ThreadPoolExecutor(5) as pool:
        slow_down(engine, monkeypatch, 0.03)
        running = [pool.submit(client.ask, TEXT, {**LONG, "stream": is_streamed}) for is_streamed in (True, False)]
        wait_for(lambda: engine.active == 2)
        waiting = [pool.submit(client.ask, TEXT, {**LONG, "stream": is_streamed}) for is_streamed in (True, False)]
        wait_for(lambda: len(engine.waiting) == 2)
        client.server.should_exit = True
        for reply in (one.result() for one in waiting):
            assert reply.status == 503 and reply.json["error"]["code"] == "shutting_down"
            assert int(reply.headers["retry-after"]) >= 1
        assert not any(one.done() for one in running)
        health = client.ask("/health")
        assert health.status == 503 and health.json["status"] == "stopping"
        assert client.ask(TEXT, LONG).status == 503
        streamed, whole = (one.result() for one in running)
        assert whole.json["usage"]["completion_tokens"] == 100
        assert streamed.events[-1] == "[DONE]" and streamed.events[-2]["choices"][0]["finish_reason"] == "length"
        client.thread.join(5)
        assert not client.thread.is_alive()


def test_what_takes_too_long_gets_an_error_of_the_api(files, monkeypatch):
    with served(files, rows=2, shutdown_timeout=0.5) as (client, engine), ThreadPoolExecutor(5) as pool:
        slow_down(engine, monkeypatch, 0.1)
        running = [pool.submit(client.ask, TEXT, {**LONG, "stream": is_streamed}) for is_streamed in (True, False)]
        wait_for(lambda: engine.active == 2)
        time.sleep(0.3)
        with started(client, 100, 10) as half:
            wait_for(lambda: engine.arriving == 1)
            began = time.monotonic()
            client.server.should_exit = True
            streamed, whole = (one.result() for one in running)
            assert half.recv(1000).startswith(b"HTTP/1.1 503")
        assert streamed.status == 200 and streamed.events[-1] == "[DONE]"
        assert streamed.events[-2]["error"]["code"] == "shutting_down"
        assert whole.status == 503 and whole.json["error"]["code"] == "shutting_down"
        client.thread.join(5)
        assert not client.thread.is_alive() and time.monotonic() - began < 3


def test_a_client_that_reads_nothing_does_not_keep_the_server(files, monkeypatch):
    """Its stream fills the socket's buffers; it is cut off, and the thread ends."""
    with served(files, rows=1, shutdown_timeout=0.2) as (client, engine):
        event = "retention_gates.recipes.serving.served_chat.event"
        monkeypatch.setattr(event, lambda data: json.dumps(data) * 9999)
        connection = client.open("POST", TEXT, {**LONG, "stream": True})
        wait_for(lambda: engine.counts.first_tokens == 1)
        time.sleep(0.5)
        client.server.should_exit = True
        client.thread.join(8)
        assert not client.thread.is_alive()
        connection.close()
        assert not [thread for thread in threading.enumerate() if thread.name.startswith("retention-gates")]
