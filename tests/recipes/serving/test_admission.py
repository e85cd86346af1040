"""The way into the engine: places, bodies, characters and tokens, at bounded memory and in nobody's way."""

import json
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from served import served, started
from tiny_adapter import make_files
from waiting import wait_for

from retention_gates.recipes.serving.admission import Admission, Limits, parsed
from retention_gates.recipes.serving.chat import Refused

pytest.importorskip("fastapi", reason="needs the extra serve")
CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
HI = {"prompt": "king", "temperature": 0, "max_tokens": 4}
MEBI = 2**20


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    return make_files(tmp_path_factory.mktemp("admission"))


def resident():
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


@contextmanager
def growth():
    """Gives a list to which the most that resident memory grew is added in the end."""
    before, is_over, found = resident(), threading.Event(), []

    def watch():
        most = 0
        while not is_over.wait(0.005):
            most = max(most, resident() - before)
        found.append(most)

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        yield found
    finally:
        is_over.set()
        watcher.join()


@pytest.mark.parametrize("most_characters, number, most_growth", [(None, 45, 60), (2 * MEBI, 12, 160)])
def test_huge_prompts_at_once_take_no_memory_and_hold_up_nobody(files, most_characters, number, most_growth):
    """The first are refused by their characters; the others, which may have so many, by their tokens, one by one."""
    body = json.dumps({"prompt": "king " * (MEBI // 5)}).encode()
    with served(files, rows=4, most_waiting=60, body=2 * MEBI, most_characters=most_characters) as (client, engine):
        assert client.ask(TEXT, HI).status == 200
        with growth() as grown, ThreadPoolExecutor(number) as pool:
            huge = [pool.submit(client.ask, TEXT, body) for _ in range(number)]
            wait_for(lambda: engine.arriving > 4)
            began = time.monotonic()
            assert client.ask(TEXT, HI).status == 200
            took = time.monotonic() - began
            replies = [one.result() for one in huge]
        assert {reply.status for reply in replies} == {400}
        assert {reply.json["error"]["code"] for reply in replies} == {"context_length_exceeded"}
        assert took < 5 and engine.arriving == 0
        assert grown[0] < most_growth * MEBI, grown[0] / MEBI


def test_requests_that_are_being_read_count_among_those_that_wait(files):
    with served(files, rows=1, most_waiting=2, body_timeout=1.0) as (client, engine):
        with started(client, 100, 10) as one, started(client, 100, 10), started(client, 100, 10):
            wait_for(lambda: engine.arriving == 3)
            assert client.ask("/health").json["waiting"] == 3
            refused = client.ask(TEXT, HI)
            assert refused.status == 429 and int(refused.headers["retry-after"]) >= 1
            assert one.recv(1000).startswith(b"HTTP/1.1 408")
        wait_for(lambda: engine.arriving == 0)
        assert client.ask(TEXT, HI).status == 200


def test_large_bodies_that_never_end_hold_up_large_ones_only(files):
    large = {**HI, "user": "x" * 100_000}
    with served(files, rows=2, most_waiting=20, body_timeout=2.0) as (client, engine), ThreadPoolExecutor(1) as pool:
        lines = [started(client, 200_000, 150_000) for _ in range(4)]
        for line in lines:
            line.__enter__()
        wait_for(lambda: engine.arriving == 4)
        time.sleep(0.2)
        began = time.monotonic()
        later = pool.submit(client.ask, TEXT, large)
        assert client.ask(TEXT, HI).status == 200 and time.monotonic() - began < 1.5
        assert not later.done()
        assert later.result().status == 200
        for line in lines:
            line.__exit__(None, None, None)


def test_a_prompt_that_takes_long_to_encode_holds_up_no_short_one(files, monkeypatch):
    encoded = Admission._encoded

    def slow(self, text):
        time.sleep(2.0 * (len(text) > 70_000))
        return encoded(self, text)

    monkeypatch.setattr(Admission, "_encoded", slow)
    with (
        served(files, rows=2, most_characters=MEBI) as (client, engine),
        ThreadPoolExecutor(3) as pool,
    ):
        long = [pool.submit(client.ask, TEXT, {"prompt": "king " * 20_000}) for _ in range(3)]
        wait_for(lambda: engine.arriving == 3)
        began = time.monotonic()
        assert client.ask(TEXT, HI).status == 200 and time.monotonic() - began < 1.5
        assert [one.result().status for one in long] == [400] * 3


@pytest.mark.parametrize(
    "path, body",
    [
        (TEXT, b'{"prompt": "king \\ud800"}'),
        (TEXT, b'{"prompt": "king", "stop": "\\udfff"}'),
        (TEXT, b'{"prompt": "king", "\\ud800": 1}'),
        (TEXT, b'{"prompt": "king", "model": "\\ud800"}'),
        (CHAT, b'{"messages": [{"role": "user", "content": "\\udbff"}]}'),
        (CHAT, b'{"messages": [{"role": "\\udc00", "content": "king"}]}'),
        (CHAT, b'{"messages": [{"role": "user", "\\udc00": "king"}]}'),
        (TEXT, '{"prompt": "king \ud800"}'.encode("utf-8", "surrogatepass")),
        (TEXT, '{"prompt": "king"}'.encode("utf-16")),
    ],
)
def test_half_a_surrogate_pair_is_refused_wherever_it_stands(endpoint, path, body):
    reply = endpoint.ask(path, body)
    assert reply.status == 400 and reply.json["error"]["code"] == "invalid_json", reply.body


@pytest.fixture(scope="module")
def endpoint(files):
    with served(files, rows=2) as (client, _):
        yield client


def test_ids_and_rendered_chats_are_bounded_before_they_are_looked_at(endpoint):
    for path, body, said in (
        (TEXT, {"prompt": [0] * 5000}, "5000 tokens"),
        (CHAT, {"messages": [{"role": "user", "content": ""}] * 9000}, "9000 characters"),  # the template adds one
    ):
        error = endpoint.ask(path, body).json["error"]
        assert error["code"] == "context_length_exceeded" and said in error["message"], error
        assert error["param"] == ("prompt" if path == TEXT else "messages")


TEXTS = st.text(st.characters(), max_size=8)  # surrogates among them
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | TEXTS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXTS, inner, max_size=3),
    max_leaves=8,
)


@settings(deadline=None, max_examples=200)
@given(JSON, st.booleans())
def test_what_is_parsed_can_be_written_as_text(data, escaped):
    body = json.dumps(data, ensure_ascii=escaped).encode("utf-8", "surrogatepass")
    try:
        found = parsed(body)
    except Refused as refused:
        assert refused.status == 400
        with pytest.raises(UnicodeEncodeError):
            json.dumps(data, ensure_ascii=False).encode()
    else:
        assert json.dumps(found, ensure_ascii=False).encode() == json.dumps(data, ensure_ascii=False).encode()


def test_limits_count_characters_by_the_context():
    assert Limits(100, 10).characters == 1600 and Limits(100, 10, most_characters=7).characters == 7
