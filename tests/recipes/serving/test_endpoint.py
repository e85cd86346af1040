"""The endpoint over HTTP: its two forms, its errors, its limits, clients that leave, and many at once."""

import json
import os
import re
import shutil
import signal
import socket
import struct
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from gated_models import gated_model as make_gated_model
from served import Client, served
from tiny_adapter import make_files

from retention_gates import BoundedCache
from retention_gates.cli import main
from retention_gates.recipes.serving import start
from retention_gates.recipes.serving.rows import ChatRows
from retention_gates.recipes.serving.start import check_memory, servable_row

pytest.importorskip("fastapi", reason="needs the extra serve")
ROWS = 4
CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
GREEDY = {"temperature": 0, "max_tokens": 14}
PROMPTS = ["king", "ship storm", "queen castle", "castle road river", "new ship"]


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    return make_files(tmp_path_factory.mktemp("endpoint"))


@pytest.fixture(scope="module")
def endpoint(files):
    with served(files, rows=ROWS, most_waiting=40, body=20_000) as both:
        yield both


def message(text, **more):
    return {"messages": [{"role": "user", "content": text}], **more}


def expected_text(engine, prompt, tokens):
    tokenizer, model = engine.tokenizer, engine.rows.model
    ids = torch.tensor([tokenizer.encode(prompt, add_special_tokens=False)])
    cache = BoundedCache(model, 8)
    output = model.generate(
        input_ids=ids, past_key_values=cache, max_new_tokens=tokens, do_sample=False, eos_token_id=None
    )
    return tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True)


def quiet(engine):
    deadline = time.monotonic() + 10
    while engine.active or engine.waiting or engine.reading:
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_a_chat_whole_and_streamed(endpoint, monkeypatch):
    client, engine = endpoint
    step = engine.rows.step  # pieces that come at once are one event
    monkeypatch.setattr(engine.rows, "step", lambda *arguments: time.sleep(0.03) or step(*arguments))
    reply = client.ask(CHAT, message("king", model="tiny", **GREEDY))
    text = expected_text(engine, "king", 14)
    (choice,) = reply.json["choices"]
    assert reply.status == 200 and reply.json["object"] == "chat.completion" and reply.json["model"] == "tiny"
    assert choice["message"] == {"role": "assistant", "content": text} and choice["finish_reason"] == "length"
    assert reply.json["usage"] == {"prompt_tokens": 1, "completion_tokens": 14, "total_tokens": 15}

    options = {"stream": True, "stream_options": {"include_usage": True}}
    reply = client.ask(CHAT, message("king", **GREEDY, **options))
    *pieces, last, usage, done = reply.events
    assert reply.headers["content-type"].startswith("text/event-stream") and done == "[DONE]"
    deltas = [piece["choices"][0]["delta"] for piece in pieces]
    assert deltas[0]["role"] == "assistant" and len(deltas) > 10
    assert "".join(delta["content"] for delta in deltas) == text
    assert last["choices"][0]["finish_reason"] == "length" and usage["choices"] == []
    assert usage["usage"]["total_tokens"] == 15
    assert {piece["object"] for piece in (*pieces, last)} == {"chat.completion.chunk"}
    assert len({piece["id"] for piece in (*pieces, last, usage)}) == 1


def test_a_completion_whole_and_streamed(endpoint):
    client, engine = endpoint
    ids = engine.tokenizer.encode("ship storm", add_special_tokens=False)
    whole = client.ask(TEXT, {"prompt": ids, **GREEDY}).json
    text = expected_text(engine, "ship storm", 14)
    assert whole["object"] == "text_completion" and whole["choices"][0]["text"] == " " + text
    events = client.ask(TEXT, {"prompt": ids, **GREEDY, "stream": True}).events
    assert "".join(one["choices"][0]["text"] for one in events[:-1]) == " " + text and events[-1] == "[DONE]"
    opened = client.ask(TEXT, {"prompt": "ship storm", **GREEDY}).json  # as the model's documents are
    assert opened["usage"]["prompt_tokens"] == 3
    cut = client.ask(TEXT, {"prompt": ids, **GREEDY, "stop": [text.split()[2]]}).json["choices"][0]
    assert cut["finish_reason"] == "stop" and cut["text"] == f" {text[: text.index(text.split()[2])]}"


def test_models_health_and_metrics(endpoint):
    client, engine = endpoint
    assert [one["id"] for one in client.ask("/v1/models").json["data"]] == ["tiny"]
    quiet(engine)
    assert client.ask("/health").json == {"status": "ok", "running": 0, "waiting": 0, "rows": ROWS}
    reply = client.ask("/metrics")
    lines = dict(line.rsplit(" ", 1) for line in reply.body.decode().splitlines() if not line.startswith("#"))
    assert reply.headers["content-type"].startswith("text/plain")
    assert float(lines['retention_gates_tokens_total{kind="completion"}']) == engine.counts.completion_tokens > 0
    assert float(lines["retention_gates_cache_bytes"]) == engine.rows.memory_bytes()
    assert float(lines['retention_gates_chats_total{how="length"}']) == engine.counts.ended["length"]


@pytest.mark.parametrize(
    "path, body, status, code",
    [
        (CHAT, b"{", 400, "invalid_json"),
        (CHAT, b"[" * 10_000, 400, "invalid_json"),
        (CHAT, message("x", n=3), 400, "invalid_value"),
        (CHAT, message("x", stop="king<pad>"), 400, "invalid_value"),
        (CHAT, message("x", model="gpt"), 404, "model_not_found"),
        (CHAT, {"messages": [{"role": r, "content": "x"} for r in ("user", "system")]}, 400, "invalid_value"),
        (CHAT, message(""), 400, "invalid_value"),
        (TEXT, {"prompt": [99]}, 400, "invalid_value"),
        (TEXT, {"prompt": "king " * 600}, 400, "context_length_exceeded"),
        (TEXT, {"prompt": "king " * 480, "max_tokens": 50}, 400, "context_length_exceeded"),
        (TEXT, {"prompt": "king " * 5_000}, 413, "body_too_large"),
        ("/v1/embeddings", {}, 404, "unknown_url"),
    ],
)
def test_errors_have_the_form_of_the_api(endpoint, path, body, status, code):
    client, engine = endpoint
    before = engine.counts.prompt_tokens
    reply = client.ask(path, body)
    assert reply.status == status and reply.json["error"]["code"] == code, reply.body
    assert reply.json["error"].keys() == {"message", "type", "param", "code"}
    assert engine.counts.prompt_tokens == before


def test_a_body_that_does_not_say_how_long_it_is(endpoint):
    client, _ = endpoint
    chunk = b"4000\r\n" + b" " * 0x4000 + b"\r\n"
    with socket.create_connection(("127.0.0.1", client.port), timeout=10) as line:
        line.sendall(
            b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\n"
            b"Content-Type: application/json\r\nTransfer-Encoding: chunked\r\n\r\n" + chunk * 2
        )
        assert line.recv(1000).startswith(b"HTTP/1.1 413")


def test_an_answer_that_says_no_length_takes_what_the_context_has_left(endpoint):
    client, _ = endpoint
    usage = client.ask(TEXT, {"prompt": "king " * 480, "temperature": 0}).json["usage"]
    assert usage["prompt_tokens"] == 481 and usage["completion_tokens"] == 512 - 481


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_frees_its_row(endpoint, monkeypatch, stream):
    client, engine = endpoint
    step = engine.rows.step
    monkeypatch.setattr(engine.rows, "step", lambda *arguments: time.sleep(0.05) or step(*arguments))
    before = engine.counts.ended.get("cancelled", 0)
    connection = client.open("POST", CHAT, message("king", temperature=0, stream=stream))
    deadline = time.monotonic() + 10
    while not engine.active:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    if stream:
        assert connection.getresponse().read(10)
    connection.sock and connection.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    connection.close()
    quiet(engine)
    assert engine.counts.ended["cancelled"] == before + 1


def test_an_error_of_the_model_before_and_in_a_stream(endpoint, monkeypatch):
    client, engine = endpoint
    step, calls = engine.rows.step, []

    def failing(*arguments):
        calls.append(arguments)
        if len(calls) == 8:
            raise RuntimeError("out of luck")
        return step(*arguments)

    monkeypatch.setattr(engine.rows, "step", failing)
    reply = client.ask(CHAT, message("king", **GREEDY, stream=True))
    assert reply.status == 200 and reply.events[-2]["error"]["code"] == "model_error" and reply.events[-1] == "[DONE]"
    calls.clear()
    reply = client.ask(CHAT, message("king", **GREEDY))
    assert reply.status == 500 and reply.json["error"]["type"] == "server_error"
    assert client.ask(CHAT, message("king", **GREEDY)).status == 200 == client.ask("/health").status


def test_many_clients_at_once_and_none_is_lost(endpoint):
    client, engine = endpoint
    quiet(engine)
    alone = {prompt: client.ask(CHAT, message(prompt, **GREEDY)).json["choices"][0] for prompt in PROMPTS}
    size, number = engine.rows.memory_bytes(), 24

    def one(n):
        prompt, stream = PROMPTS[n % len(PROMPTS)], n % 2 == 0
        reply = client.ask(CHAT, message(prompt, **GREEDY, stream=stream))
        if not stream:
            return prompt, reply.json["choices"][0]["message"]["content"]
        assert reply.events[-1] == "[DONE]"
        return prompt, "".join(e["choices"][0]["delta"].get("content", "") for e in reply.events[:-1])

    with ThreadPoolExecutor(number) as pool:
        answers = list(pool.map(one, range(number)))
    assert len(answers) == number
    assert all(text == alone[prompt]["message"]["content"] for prompt, text in answers)
    assert engine.rows.memory_bytes() == size and engine.counts.refused == 0


def test_too_many_clients_are_told_when_to_come_again(endpoint, monkeypatch):
    client, engine = endpoint
    monkeypatch.setattr(engine, "most_waiting", 2)
    step = engine.rows.step
    monkeypatch.setattr(engine.rows, "step", lambda *arguments: time.sleep(0.02) or step(*arguments))
    with ThreadPoolExecutor(12) as pool:
        body = message("king", temperature=0, max_tokens=60)  # more than a second, in which all have come
        replies = list(pool.map(lambda _: client.ask(CHAT, body), range(12)))
    taken, refused = ([r for r in replies if r.status == status] for status in (200, 429))
    assert len(taken) + len(refused) == 12 and len(taken) >= ROWS and refused
    assert all(int(reply.headers["retry-after"]) >= 1 for reply in refused)
    assert {reply.json["error"]["type"] for reply in refused} == {"rate_limit_error"}


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--max-chats", "0"], "--max-chats 0 must be 1 or more"),
        (["--max-pause-ms", "0"], "--max-pause-ms 0.0 must be above 0"),
        (["--timeout", "nan"], "--timeout nan must be above 0"),
        (["--cache-gib", "1e-6"], "has no room for two rows"),
        (["--max-connections", "100000000000"], "needs more open files than"),
        (["--port", "70000"], "--port 70000 must be from 0 to 65535"),
        (["--memory-size", "2"], "memory_size=2 must be at least"),
        (["--budgets", "adaptive"], "move between heads"),
        (["--budgets", "half"], "budgets='half'"),
        (["--api-key", "a b"], "--api-key must be of printable"),
        (["--cors-origin", "example"], "--cors-origin 'example' must be such as"),
        (["--max-chats", "100000000"], "takes"),
        (["--device", "cuda:99"], "device='cuda:99' cannot be used here"),
    ],
)
def test_the_command_refuses(files, arguments, message, capsys, monkeypatch):
    """Before the base's weights are loaded."""
    monkeypatch.setattr("retention_gates.recipes.serve.load_model", lambda *_, **__: pytest.fail("weights"))
    assert main(["serve", "--adapter", str(files.adapter), *arguments]) == 2
    assert message in capsys.readouterr().err


def test_a_pause_and_a_chunk_size_contradict_each_other(files, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["serve", "--adapter", str(files.adapter), "--max-pause-ms", "50", "--prefill-chunk-size", "64"])
    assert stopped.value.code == 2 and "not allowed with argument" in capsys.readouterr().err


def test_an_adapter_of_another_base_is_refused_before_weights_are_loaded(files, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("retention_gates.recipes.serve.load_model", lambda *_, **__: pytest.fail("weights"))
    other = tmp_path / "other"
    shutil.copytree(files.model, other)
    (other / "model.safetensors").unlink()
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps(config | {"hidden_size": 2 * config["hidden_size"]}))
    assert main(["serve", "--adapter", str(files.adapter), "--model", str(other)]) == 2
    assert "hidden" in capsys.readouterr().err


def test_memory_that_does_not_fit_is_refused_with_what_would(monkeypatch):
    model = make_gated_model()
    row = servable_row(model, 8, None, torch.float32)
    weights = sum(parameter.numel() for parameter in model.parameters()) * 4
    monkeypatch.setattr(start, "free_bytes", lambda _: int((weights + 5.5 * row) / (1 - start.SPARE)))
    check_memory(model, row, 4, torch.device("cpu"), torch.float32)
    with pytest.raises(ValueError, match=r"5 chats of .* do not fit .*: 4 chats would. Ask for --max-chats 4,"):
        check_memory(model, row, 5, torch.device("cpu"), torch.float32)
    monkeypatch.setattr(start, "free_bytes", lambda _: weights)
    with pytest.raises(ValueError, match=r"0 chats would. Ask for a smaller model"):
        check_memory(model, row, 1, torch.device("cpu"), torch.float32)
    rows = ChatRows(model, 8, rows=1, chunk_size=16)
    assert 0 <= rows.bytes_per_row - row < 2000  # what belongs to a layer and not to its entries


@pytest.mark.slow  # a process that imports torch, 15 s
def test_the_command_serves_until_it_is_told_to_stop(files):
    code = "import sys; from retention_gates.cli import main; sys.exit(main(sys.argv[1:]))"
    options = ["--max-chats", "2", "--memory-size", "8", "--port", "0", "--name", "tiny", "--device", "cpu"]
    process = subprocess.Popen(
        [sys.executable, "-c", code, "serve", "--adapter", str(files.adapter), *options],
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)},
    )
    lines = []
    for line in process.stderr:
        lines.append(line)
        if found := re.search(r"running on http://127.0.0.1:(\d+)", line):
            break
    try:
        assert any("2 chats at a time, 0.01 MiB each, however long" in line for line in lines), lines
        client = Client(int(found[1]))
        assert client.ask("/health").json["rows"] == 2
        assert client.ask(TEXT, {"prompt": "king", **GREEDY}).json["usage"]["completion_tokens"] > 0
    finally:
        process.send_signal(signal.SIGINT)
        process.communicate(timeout=30)
    assert process.returncode in (0, 130)
