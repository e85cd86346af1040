"""Many clients at once against a running endpoint: are all answered, how fast, and does memory stay flat?

    retention-gates serve --adapter ADAPTER --max-chats 32 --name model &
    PYTHONPATH=src python recipes/bench/serving_load.py --url http://127.0.0.1:8000 --clients 200 --requests 1000

Every second request streams; prompts and lengths differ by the seed. Memory is what the endpoint's /metrics says. The
endpoint may be of any kind that has them; its --max-waiting must be at least the number of clients.
"""

import argparse
import json
import random
import threading
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from statistics import median
from typing import Any

from retention_gates.recipes.bench.harness import Measurement, report

WORDS = "the a old new red blue ship sea storm king queen castle road river sings sleeps runs under over and".split()


@dataclass
class Answer:
    tokens: int = 0
    seconds: float = 0.0
    first: float | None = None  # seconds until the first piece, of a stream
    failure: str | None = None


def ask(url: str, index: int, most_tokens: int) -> Answer:
    """One request; what goes wrong is noted, never raised."""
    choose = random.Random(index)
    is_streamed = index % 2 == 0
    body = {
        "prompt": " ".join(choose.choices(WORDS, k=choose.randint(4, 120))),
        "max_tokens": choose.randint(max(1, most_tokens // 4), most_tokens),
        "seed": index,
        "stream": is_streamed,
    }
    if is_streamed:
        body["stream_options"] = {"include_usage": True}
    request = urllib.request.Request(
        f"{url}/v1/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    answer, began = Answer(), time.monotonic()
    try:
        with urllib.request.urlopen(request, timeout=600) as response:
            if is_streamed:
                _read_stream(response, answer, began)
            else:
                answer.tokens = json.load(response)["usage"]["completion_tokens"]
    except (OSError, ValueError, KeyError) as error:
        answer.failure = f"{type(error).__name__}: {error}"
    answer.seconds = time.monotonic() - began
    return answer


def _read_stream(response: Any, answer: Answer, began: float) -> None:
    last = b""
    for line in response:
        if not line.startswith(b"data: "):
            continue
        answer.first = answer.first or time.monotonic() - began
        last = line[6:].strip()
        said = {} if last == b"[DONE]" else json.loads(last)
        if usage := said.get("usage"):
            answer.tokens = usage["completion_tokens"]
        if "error" in said:
            answer.failure = f"the stream says {said['error']}"
    if last != b"[DONE]":
        answer.failure = f"the stream broke off after {last[:100]!r}"


def metric(url: str, name: str) -> float:
    with urllib.request.urlopen(f"{url}/metrics", timeout=60) as response:
        lines = response.read().decode().splitlines()
    return next(float(line.split()[1]) for line in lines if line.startswith(f"{name} "))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--url", default="http://127.0.0.1:8000")
    parser.add_argument("--clients", type=int, default=200, help="requests at a time")
    parser.add_argument("--requests", type=int, default=1000)
    parser.add_argument("--max-tokens", type=int, default=64)
    parser.add_argument("--name", default="ours", help="of the model that is served, for the results")
    options = parser.parse_args()

    resident: list[float] = []
    is_over = threading.Event()

    def watch() -> None:
        while not is_over.wait(1.0):
            resident.append(metric(options.url, "process_resident_memory_bytes"))

    ask(options.url, 0, options.max_tokens)
    cache = metric(options.url, "retention_gates_cache_bytes")
    watcher = threading.Thread(target=watch)
    watcher.start()
    began = time.monotonic()
    with ThreadPoolExecutor(options.clients) as clients:
        answers = list(clients.map(lambda n: ask(options.url, n, options.max_tokens), range(options.requests)))
    seconds = time.monotonic() - began
    is_over.set()
    watcher.join()

    failures = [answer.failure for answer in answers if answer.failure]
    for failure in sorted(set(failures)):
        print(f"{failures.count(failure)} x {failure}")
    if metric(options.url, "retention_gates_cache_bytes") != cache:
        raise SystemExit("The cache has changed its size.")
    firsts = sorted(answer.first for answer in answers if answer.first)
    waits = sorted(answer.seconds for answer in answers)
    half = len(resident) // 2
    # the first quarter is left out: threads and buffers are made then
    grown = max(resident[half:]) - max(resident[half // 2 : half]) if half > 3 else float("nan")
    values = [
        ("requests lost", len(failures), "requests"),
        ("tokens per second, all clients", sum(answer.tokens for answer in answers) / seconds, "tok/s"),
        ("first token, median", median(firsts), "s"),
        ("first token, 99th percentile", firsts[int(0.99 * (len(firsts) - 1))], "s"),
        ("whole answer, median", median(waits), "s"),
        ("cache, all the time", cache / 2**20, "MiB"),
        ("resident memory, growth in the second half", grown / 2**20, "MiB"),
    ]
    rows = int(metric(options.url, "retention_gates_rows"))
    case = f"clients={options.clients} requests={options.requests} rows={rows} {options.name}"
    report("serving_load", [Measurement(f"{case}: {what}", "ours", value, unit) for what, value, unit in values])


if __name__ == "__main__":
    main()
