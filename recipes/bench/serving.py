"""The endpoint over HTTP: tokens per second, pauses of running chats, chats per GiB; server and clients in one call.

    python recipes/bench/serving.py                                     # Qwen3-4B's shape, 1 to 128 chats
    python recipes/bench/serving.py --chats 4 --prompts 1024 --contenders ours full
    python recipes/bench/serving.py --adapter user/adapter --model Qwen/Qwen2.5-Coder-1.5B
    python recipes/bench/serving.py --shape tiny --device cpu --memory-size 16 --chats 2 --prompts 40 --answer 100

`ours` keeps `--memory-size` entries per head; `full cache, our step` is the same endpoint with room for prompt and
answer, so that nothing is evicted. Clients are threads of another process. The rate is that of the engine's tokens
while all chats run; it counts only if every client got a whole answer. `transformers CB` is `generate_batch` of the
base model without HTTP, by the difference in time between a whole and a quarter answer. A pause is the time between
two events of a stream while another prompt is read.
"""

import argparse
import http.client
import json
import multiprocessing
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from peft import PeftModel
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import GenerationConfig, PreTrainedTokenizerFast

from retention_gates.recipes.bench.decode import SHAPES, make_model
from retention_gates.recipes.bench.harness import Measurement, report
from retention_gates.recipes.loading.models import base_name, load_model, load_tokenizer
from retention_gates.recipes.serving.access import Rules
from retention_gates.recipes.serving.admission import Admission, Limits
from retention_gates.recipes.serving.engine import Engine
from retention_gates.recipes.serving.pace import fitting_chunk
from retention_gates.recipes.serving.rows import ChatRows

NAMES = {"ours": "ours", "full": "full cache, our step", "transformers": "transformers CB"}
TICK = 0.005  # seconds between two looks at the engine


@dataclass
class Stream:
    """The events that one client saw."""

    tokens: int = 0
    failure: str | None = None
    times: list[float] = field(default_factory=list)  # of events, on the clock that all processes share


def ask(port: int, prompt: list[int], answer: int) -> Stream:
    """One streamed answer."""
    seen = Stream()
    body: dict[str, Any] = {"prompt": prompt, "max_tokens": answer, "temperature": 0, "stream": True}
    body["stream_options"] = {"include_usage": True}
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=600)
    headers = {"Content-Type": "application/json"}
    connection.request(
        "POST", "/v1/completions", json.dumps(body | {"stream_options": {"include_usage": True}}), headers
    )
    response, last = connection.getresponse(), b""
    for line in response:
        if line.startswith(b"data: "):
            seen.times.append(time.monotonic())
            last = line[6:].strip()
            if b'"usage"' in last:
                seen.tokens = json.loads(last)["usage"]["completion_tokens"]
    if response.status != 200 or last != b"[DONE]" or seen.tokens != answer:
        seen.failure = f"status {response.status}, {seen.tokens} tokens, {last[:200]!r}"
    return seen


def ask_all(port: int, prompts: list[list[int]], answer: int) -> list[Stream]:
    """All prompts at once; runs in a process of its own, so that clients and engine do not share Python's lock."""
    with ThreadPoolExecutor(len(prompts)) as clients:
        return list(clients.map(lambda prompt: ask(port, prompt, answer), prompts))


@contextmanager
def endpoint(model: PeftModel, tokenizer: PreTrainedTokenizerFast, rows: ChatRows) -> Iterator[tuple[int, Engine]]:
    """A running server's port and its engine."""
    from retention_gates.recipes.serving.server import make_server

    chats = rows.counts[-1]
    engine = Engine(rows, chats, tokenizer, eos=set(), most_waiting=2 * chats)
    admission = Admission(tokenizer, "bench", Limits(rows.context, rows.context, body=2**24, timeout=3600))
    server = make_server(
        engine, admission, host="127.0.0.1", port=0, shutdown_timeout=1, rules=Rules(), log_level="error",
        max_connections=chats + 16,
    )  # fmt: skip
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        while not server.started:
            if not thread.is_alive():
                raise SystemExit("The server did not start.")
            time.sleep(TICK)
        yield server.servers[0].sockets[0].getsockname()[1], engine
    finally:
        server.should_exit = True
        thread.join()


def watched(engine: Engine, asked: Any) -> list[tuple[float, int, int]]:
    """Time, tokens so far and running chats, until the clients are through."""
    seen = []
    while not asked.ready():
        seen.append((time.monotonic(), engine.counts.completion_tokens, engine.active))
        time.sleep(TICK)
    return seen


def checked(streams: list[Stream]) -> list[Stream]:
    if failures := [stream.failure for stream in streams if stream.failure]:
        raise SystemExit(f"{len(failures)} of {len(streams)} answers failed: {failures[0]}")
    return streams


def random_prompts(vocabulary: int, count: int, length: int) -> list[list[int]]:
    return torch.randint(vocabulary, (count, length), generator=torch.Generator().manual_seed(0)).tolist()


def rate(port: int, engine: Engine, prompts: list[list[int]], answer: int, pool: Any) -> float:
    """Tokens per second while all chats run."""
    asked = pool.apply_async(ask_all, (port, prompts, answer))
    seen = watched(engine, asked)
    checked(asked.get())
    full = [one for one in seen if one[2] == len(prompts)]
    if len(full) < 2 or full[-1][1] == full[0][1]:
        raise SystemExit("The chats never all ran at once: ask for a longer --answer.")
    return (full[-1][1] - full[0][1]) / (full[-1][0] - full[0][0])


def pauses(port: int, running: list[list[int]], long: list[int], answer: int, pool: Any) -> list[float]:
    """Milliseconds between events of running chats from the moment that another prompt comes to its first event."""
    asked = pool.apply_async(ask_all, (port, running, answer))
    time.sleep(0.5)
    began = time.monotonic()
    other = checked(ask_all(port, [long], 2))[0].times[0]
    found = []
    for stream in checked(asked.get()):
        pairs = zip(stream.times, stream.times[1:], strict=False)
        found += [1e3 * (after - before) for before, after in pairs if after > began and before < other]
    return sorted(found)


def continuous_batching(model: PeftModel, prompts: list[list[int]], answer: int) -> float:
    """Tokens per second of transformers' own batching of the base model over its full cache."""

    def seconds(tokens: int) -> float:
        config = GenerationConfig(max_new_tokens=tokens, do_sample=False, eos_token_id=-1, pad_token_id=0)
        began = time.perf_counter()
        outputs = base.generate_batch(prompts, generation_config=config, progress_bar=False, persistent_manager=True)
        if wrong := [one.error for one in outputs.values() if one.error or len(one.generated_tokens) != tokens]:
            raise SystemExit(f"transformers answered {len(wrong)} prompts wrongly: {wrong[0]}")
        return time.perf_counter() - began

    with model.disable_adapter():
        base: Any = model.get_base_model()
        short = max(1, answer // 4)
        try:
            seconds(answer)  # what is made once, for as many tokens as come
            took = seconds(answer) - seconds(short)
        finally:
            base.destroy_cached_continuous_batching_manager()
    if took <= 0:
        raise SystemExit("transformers took no longer for a whole answer: ask for a longer --answer.")
    return len(prompts) * (answer - short) / took


def letters(vocabulary: int) -> PreTrainedTokenizerFast:
    """A tokenizer for weights that have none: a word for each id."""
    tokenizer = Tokenizer(models.WordLevel({f"w{number}": number for number in range(vocabulary)}, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


def main() -> None:
    options = read_options()
    if options.adapter:
        name = base_name(options.model, options.adapter)
        model, tokenizer = load_model(name, options.adapter, device=options.device), load_tokenizer(name)
        shape = name.rsplit("/", 1)[-1].lower()
    else:
        model = make_model(options.shape, options.device, torch.float32 if options.device == "cpu" else torch.bfloat16)
        tokenizer, shape = letters(model.config.vocab_size), options.shape
    measured: dict[str, list[Measurement]] = {"serving": [], "serving_pause": [], "serving_room": []}
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        for chats in options.chats:
            for length in options.prompts:
                case = f"{shape} {chats} chats prompt={length} answer={options.answer}"
                for contender in options.contenders:
                    measure(case, contender, chats, length, model, tokenizer, pool, options, measured)
    for bench, measurements in measured.items():
        report(bench, measurements)


def measure(
    case: str, contender: str, chats: int, length: int, model: PeftModel, tokenizer: Any, pool: Any,
    options: argparse.Namespace, measured: dict[str, list[Measurement]],
) -> None:  # fmt: skip
    """Adds what one contender reaches."""
    prompts = random_prompts(model.config.vocab_size, chats, length)
    if contender == "transformers":
        value = continuous_batching(model, prompts, options.answer)
        measured["serving"].append(Measurement(case, NAMES[contender], value, "tok/s"))
        return
    size = options.memory_size if contender == "ours" else length + options.answer + 1
    budgets = "uniform" if contender == "full" else None
    try:
        rows = ChatRows(model, size, rows=chats, chunk_size=options.prefill_chunk_size, budgets=budgets)
    except (torch.OutOfMemoryError, ValueError) as error:
        print(f"{case}: {NAMES[contender]} has no room: {' '.join(str(error).split())[:200]}", flush=True)
        return
    if options.max_pause_ms is not None:
        rows.chunk_size = fitting_chunk(rows, options.max_pause_ms / 1e3)
    room = 2**30 / rows.bytes_per_row
    measured["serving_room"].append(Measurement(case, NAMES[contender], room, "chats/GiB"))
    with endpoint(model, tokenizer, rows) as (port, engine):
        rate(port, engine, prompts, options.answer, pool)  # the first is not counted
        value = rate(port, engine, prompts, options.answer, pool)
        measured["serving"].append(Measurement(case, NAMES[contender], value, "tok/s"))
        if chats > 1 and (found := pauses(port, prompts[1:], prompts[0], options.answer, pool)):
            worst = found[int(0.99 * (len(found) - 1))]
            measured["serving_pause"].append(Measurement(f"{case} p99", NAMES[contender], worst, "ms"))


def read_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", choices=SHAPES, default="qwen3-4b", help="of random weights")
    parser.add_argument("--adapter", help="gates of a real model instead")
    parser.add_argument("--model", help="its base, if not the one that the adapter names")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--memory-size", type=int, default=1024)
    parser.add_argument("--chats", type=int, nargs="+", default=[1, 4, 32, 128])
    parser.add_argument("--prompts", type=int, nargs="+", default=[1024, 30_000], help="tokens")
    parser.add_argument("--answer", type=int, default=512, help="tokens")
    parser.add_argument("--contenders", nargs="+", choices=NAMES, default=list(NAMES))
    chunk = parser.add_mutually_exclusive_group()
    chunk.add_argument("--prefill-chunk-size", type=int, default=512)
    chunk.add_argument("--max-pause-ms", type=float)
    return parser.parse_args()


if __name__ == "__main__":
    main()
