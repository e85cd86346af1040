"""Tokens per second of `model.generate` with a bounded cache, against full caches and eager eviction.

    python recipes/bench/decode.py                                # batch 4 and rivals; about 70 s on an H100 of 80 GB
    python recipes/bench/decode.py --compile --kernels            # ours through torch.compile as well: a minute more
    python recipes/bench/decode.py --batches 1 4 32 --no-rivals
    python recipes/bench/decode.py --static                       # transformers' static cache, compiled: 75 s more
    python recipes/bench/decode.py --batches 1 --contexts 1024 8192 32768 131072 --plot decode_context.png
    python recipes/bench/decode.py --device cpu --shape smollm2-135m --batches 1 --memory-size 256 --context 4096
    python recipes/bench/decode.py --kvpress                      # kvpress's decoding too, if it is installed
    python recipes/bench/decode.py --rows                         # the endpoint's rows too, without HTTP

Random weights in the shape of Qwen3-4B, bf16. Every contender is a cache that has read `--context` tokens: bounded
ones hold what they keep of a short prompt and are told that more came before, full ones random keys and values.
Tokens per second are the batch times 128 over the difference in time between `generate` of 160 and of 32 tokens. The
limit is the time in which the device reads the weights and the entries once, at the measured rate of a copy.
On a CPU it is fp32, `generate` of 40 and of 8 tokens, in seven turns of all contenders, of which the median is taken.
"""

import argparse
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from statistics import median
from typing import Any

import torch
from peft import PeftModel, get_peft_model
from torch.profiler import ProfilerActivity, profile
from transformers import AutoModelForCausalLM, DynamicCache, LlamaConfig, Qwen3Config, StaticCache
from transformers.cache_utils import Cache

from retention_gates import BoundedCache, RetentionGateConfig
from retention_gates.gates.attention.cache_layer import EvictingLayer
from retention_gates.recipes.bench.decode_rivals import EagerCache, import_kvpress, pressed
from retention_gates.recipes.bench.harness import SMOLLM2_135M, Measurement, bandwidth_gbs, report, time_ms
from retention_gates.recipes.report.figures import require_matplotlib
from retention_gates.recipes.serving.rows import ChatRows
from retention_gates.recipes.serving.sampling import Sampler, Sampling, next_tokens

QWEN3: dict[str, Any] = dict(head_dim=128, num_key_value_heads=8, vocab_size=151_936)
SHAPES: dict[str, Any] = {
    "qwen3-0.6b": lambda: Qwen3Config(
        **QWEN3, hidden_size=1024, intermediate_size=3072, num_hidden_layers=28, num_attention_heads=16,
        tie_word_embeddings=True,
    ),
    "qwen3-4b": lambda: Qwen3Config(
        **QWEN3, hidden_size=2560, intermediate_size=9728, num_hidden_layers=36, num_attention_heads=32,
        tie_word_embeddings=True,
    ),
    "qwen3-8b": lambda: Qwen3Config(
        **QWEN3, hidden_size=4096, intermediate_size=12288, num_hidden_layers=36, num_attention_heads=32,
        tie_word_embeddings=False,
    ),
    "tiny": lambda: LlamaConfig(
        hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        head_dim=16, vocab_size=100, tie_word_embeddings=True,
    ),
    "smollm2-135m": lambda: LlamaConfig(**SMOLLM2_135M),
}  # fmt: skip
SHORT, LONG = 32, 160  # new tokens of the two runs whose difference is measured
FEW = 8, 40  # where steps are slow
PROMPT = 1536  # tokens that a bounded cache really reads


def make_model(shape: str, device: str, dtype: torch.dtype) -> PeftModel:
    torch.manual_seed(0)
    config = SHAPES[shape]()
    config.max_position_embeddings = 262_144
    with torch.device(device):
        base = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation="sdpa")
    model = get_peft_model(base, RetentionGateConfig(initial_half_life=512.0)).eval()
    model.generation_config.eos_token_id = None
    return model


def ragged_budgets(layers: int, heads: int, memory_size: int) -> list[list[int]]:
    """Budgets as uneven as calibrated ones: a few heads have many times the mean."""
    generator = torch.Generator().manual_seed(0)
    share = torch.randn(layers * heads, generator=generator).mul(1.2).exp()
    floor, total = min(32, memory_size // 2), layers * heads * memory_size
    entries = (share / share.sum() * (total - floor * layers * heads)).long() + floor
    entries[0] += total - int(entries.sum())
    return entries.view(layers, heads).tolist()


@torch.no_grad()
def read(model: PeftModel, cache: Any, batch: int, context: int) -> None:
    """Lets a cache that evicts read a prompt, and moves it on to the end of the context."""
    prompt = torch.randint(model.config.vocab_size, (batch, min(context, PROMPT)), device=model.device)
    model(input_ids=prompt, past_key_values=cache, logits_to_keep=1)
    for layer in cache.layers:
        layer.seen += context - prompt.shape[1]
        if isinstance(layer, EvictingLayer):
            layer.columns = context
        held = "slot_positions" if hasattr(layer, "slot_positions") else "held_positions"
        entries = getattr(layer, held)
        entries += (context - prompt.shape[1]) * (entries >= 0)


@torch.no_grad()
def fill(model: PeftModel, cache: Cache, batch: int, context: int) -> None:
    """Random keys and values in a full cache."""
    config = model.config
    shape = (batch, config.num_key_value_heads, context, config.head_dim)
    for layer in range(config.num_hidden_layers):
        key, value = (torch.randn(shape, device=model.device, dtype=model.dtype) for _ in range(2))
        cache.update(key, value, layer)


def generate_seconds(model: PeftModel, cache: Any, batch: int, context: int, tokens: int, **options: Any) -> float:
    """Seconds of one `generate` whose last prompt token comes after the context."""
    past = int(cache.get_seq_length())
    ids = torch.randint(model.config.vocab_size, (batch, 1), device=model.device)  # after all that was read
    mask = torch.ones(batch, past + 1, dtype=torch.int64, device=model.device)
    synchronize(model)
    begin = time.perf_counter()
    model.generate(
        input_ids=ids, attention_mask=mask, past_key_values=cache, do_sample=False,
        max_new_tokens=tokens, **options,
    )  # fmt: skip
    synchronize(model)
    return time.perf_counter() - begin


def synchronize(model: PeftModel) -> None:
    if model.device.type == "cuda":
        torch.cuda.synchronize()


def step_ms(
    model: PeftModel, cache: Any, batch: int, context: int, repeats: int, tokens: tuple[int, int], **options: Any
) -> tuple[float, float]:
    """Median and range of the time of one decoding step, in ms."""
    short, long = tokens
    generate_seconds(model, cache, batch, context, short, **options)  # what is compiled and captured once
    times = []
    for _ in range(repeats):
        first = generate_seconds(model, cache, batch, context, short, **options)
        second = generate_seconds(model, cache, batch, context, long, **options)
        times.append(1e3 * (second - first) / (long - short))
    return median(times), max(times) - min(times)


def rows_ms(model: PeftModel, batch: int, memory_size: int, steps: int = 128) -> tuple[float, float]:
    """Median and range of the time of one step of the endpoint's rows, the choice of each row's token included."""
    rows = ChatRows(model, memory_size, rows=batch, chunk_size=512, budgets="uniform")
    samplers = {row: Sampler(Sampling(steps, temperature=0.0)) for row in range(batch)}
    times, tokens = [], [0] * batch
    for repeat in range(4):  # the first is not counted
        synchronize(model)
        begin = time.perf_counter()
        for step in range(steps):
            chosen = next_tokens(rows.step(tokens, [repeat * steps + step] * batch), samplers)
            tokens = [chosen[row] or 0 for row in range(batch)]
        times.append(1e3 * (time.perf_counter() - begin) / steps)
    rows.close()
    return median(times[1:]), max(times[1:]) - min(times[1:])


def limit_ms(model: PeftModel, batch: int, entries: int, rate: float) -> float:
    """Time in which the device reads each weight and entry once, in ms.

    Args:
        entries: per layer and KV head.
        rate: of reading, in GB/s.
    """
    config = model.config
    weights = {p.data_ptr(): p.nbytes for p in model.parameters()}
    if not config.tie_word_embeddings:
        del weights[model.get_input_embeddings().weight.data_ptr()]  # of which a step reads a few rows
    bytes_per_entry = 2 * config.head_dim * model.dtype.itemsize
    held = batch * config.num_hidden_layers * config.num_key_value_heads * entries * bytes_per_entry
    return (sum(weights.values()) + held) / rate / 1e6


def contenders(
    arguments: argparse.Namespace, model: PeftModel, batch: int, context: int
) -> dict[str, tuple[Callable[[], Any], int]]:
    """Name -> what makes a cache that has read the context, and the entries that it holds per head."""
    size, config = arguments.memory_size, model.config

    def bounded(**options: Any) -> Callable[[], Any]:
        def make() -> BoundedCache:
            cache = BoundedCache(model, **({"memory_size": size, "budgets": "uniform"} | options))
            read(model, cache, batch, context)
            return cache

        return make

    def eager() -> EagerCache:
        cache = EagerCache(model, size)
        read(model, cache, batch, context)
        return cache

    def full(make_cache: Callable[[], Cache], entries: int = context) -> Callable[[], Any]:
        def make() -> Cache:
            cache = make_cache()
            fill(model, cache, batch, entries)
            return cache

        return make

    budgets = ragged_budgets(config.num_hidden_layers, config.num_key_value_heads, size)
    found: dict[str, tuple[Callable[[], Any], int]] = {"ours": (bounded(), size)}
    if arguments.compile:
        found["ours, compiled"] = (bounded(compile=True), size)
    if arguments.plot:
        found["full cache, eager"] = (full(lambda: DynamicCache(config=config)), context)
        return found
    found["ours, ragged budgets"] = (bounded(budgets=budgets), size)
    if not arguments.rivals:
        return found
    if model.device.type == "cuda":
        found["ours, graph=False"] = (bounded(graph=False), size)
    found["eager cat, top-k, gather"] = (eager, size)
    found["full cache, eager"] = (full(lambda: DynamicCache(config=config)), context)
    room = context + 4 * LONG
    if model.device.type == "cuda":  # empty slots are read as full ones are
        found["our step, nothing evicted"] = (bounded(memory_size=room), room)
    if arguments.static:
        found["full static cache, compiled"] = (full(lambda: StaticCache(config=config, max_cache_len=room)), context)
    if arguments.kvpress:
        found["kvpress, largest keys go"] = (full(lambda: DynamicCache(config=config), size), size)
    return found


def setting(name: str, model: PeftModel, memory_size: int) -> AbstractContextManager[Any]:
    """Gives the settings in which a contender of this name runs."""
    if name.startswith("kvpress"):
        return pressed(model, memory_size)
    return model.disable_adapter() if name.startswith("full") else nullcontext()


def measure(
    arguments: argparse.Namespace, model: PeftModel, batch: int, context: int, rate: float
) -> list[Measurement]:
    case = f"{arguments.shape} B={batch} M={arguments.memory_size} context {context}"
    rows: list[Measurement] = []
    for name, (make, entries) in contenders(arguments, model, batch, context).items():
        first = len(rows)
        with torch.no_grad():
            begin = time.perf_counter()
            cache = make()
            ours = isinstance(cache, BoundedCache)
            options: dict[str, Any] = {"disable_compile": "static" not in name}
            tokens = (SHORT, LONG) if ours and cache.decode_step else FEW
            with setting(name, model, arguments.memory_size):
                value, spread = step_ms(model, cache, batch, context, 3 if ours else 1, tokens, **options)
        limit = 1e3 * batch / limit_ms(model, batch, entries, rate)
        rate_of = 1e3 * batch / value
        rows.append(Measurement(case, name, rate_of, "tok/s", rate_of * spread / value, limit))
        seconds = time.perf_counter() - begin
        if ours and cache.decode_step and cache.decode_step.captures:
            value, spread = replay_ms(cache)
            rows.append(Measurement(case, f"{name}, the graph alone", 1e3 * batch / value, "tok/s", None, limit))
        report("decode", rows[first:])
        print(f"{seconds:.1f} s in all", flush=True)
        if arguments.kernels and ours and cache.decode_step and cache.decode_step.captures:
            print_kernels(cache)
        del cache
    if arguments.rows:
        value, spread = rows_ms(model, batch, arguments.memory_size)
        rate_of, limit = 1e3 * batch / value, 1e3 * batch / limit_ms(model, batch, arguments.memory_size, rate)
        row = Measurement(case, "ours, the endpoint's rows", rate_of, "tok/s", rate_of * spread / value, limit)
        report("decode", [row])
        rows.append(row)
    return rows


def measure_in_turns(
    arguments: argparse.Namespace, model: PeftModel, batch: int, context: int, turns: int = 7
) -> list[Measurement]:
    """As `measure`, for a CPU, whose speed changes by the minute: all contenders once, then all again."""
    case = f"{arguments.shape} B={batch} M={arguments.memory_size} context {context} fp32"
    found, caches = contenders(arguments, model, batch, context), {}
    times: dict[str, list[float]] = {name: [] for name in found}
    for _ in range(turns):
        for name, (make, _) in found.items():
            is_full = name.startswith("full")
            if is_full or name not in caches:  # a full cache has grown since its last turn
                caches[name] = make()
            with setting(name, model, arguments.memory_size):
                value, _ = step_ms(model, caches[name], batch, context, 1, FEW, disable_compile=True)
            times[name].append(value)
    rates = {name: [1e3 * batch / value for value in values] for name, values in times.items()}
    rows = [Measurement(case, name, median(each), "tok/s", max(each) - min(each)) for name, each in rates.items()]
    report("decode", rows)
    return rows


def replay_ms(cache: BoundedCache) -> tuple[float, float]:
    """Time of the graph itself, one replay after the other."""
    assert cache.decode_step is not None and cache.decode_step.captures
    return time_ms(cache.decode_step.captures[0].replay, repeats=50)


def print_kernels(cache: BoundedCache, top: int = 25) -> None:
    """Where the time of one replay goes."""
    assert cache.decode_step is not None and cache.decode_step.captures
    with profile(activities=[ProfilerActivity.CUDA]) as found:
        for _ in range(5):
            cache.decode_step.captures[0].replay()
        torch.cuda.synchronize()
    averages = sorted(found.key_averages(), key=lambda each: -each.self_device_time_total)
    total = sum(each.self_device_time_total for each in averages)
    print(f"{total / 5e3:.3f} ms of kernels, {sum(each.count for each in averages) // 5} launches")
    for each in averages[:top]:
        print(f"{each.self_device_time_total / 5e3:8.3f} ms {each.count // 5:5} x {each.key[:100]}")


def plot(points: dict[str, list[tuple[int, float]]], path: Path) -> None:
    """Time of a step against the tokens of context, one line per contender."""
    require_matplotlib()
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    for name, line in points.items():
        if "alone" not in name:
            axes.plot(*zip(*line, strict=True), marker="o", label=name)
    axes.set_xscale("log", base=2)
    axes.set_ylim(bottom=0)
    axes.set_xlabel("tokens of context")
    axes.set_ylabel("ms per decoding step")
    axes.legend()
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=150)
    print(f"wrote {path}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="qwen3-4b")
    parser.add_argument("--batches", type=int, nargs="+", default=[4])
    parser.add_argument("--memory-size", type=int, default=1024)
    parser.add_argument("--context", type=int, default=32_768)
    parser.add_argument("--contexts", type=int, nargs="+", help="several, for --plot")
    parser.add_argument("--plot", type=Path, help="PNG of ms per step against the context, beside the full cache")
    parser.add_argument("--compile", action="store_true", help="ours through torch.compile as well")
    parser.add_argument("--rivals", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--static", action="store_true", help="compile transformers' static cache, 75 s")
    parser.add_argument("--kvpress", action="store_true", help="its decoding, with an eviction once in 16 steps")
    parser.add_argument("--rows", action="store_true", help="the steps of the endpoint too, without HTTP")
    parser.add_argument("--kernels", action="store_true", help="print the kernels of one step")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    arguments = parser.parse_args()
    if arguments.kvpress:
        import_kvpress()
    torch.backends.cuda.enable_cudnn_sdp(False)  # it plans anew for every length of a cache that grows
    is_cuda = arguments.device == "cuda"
    begin = time.perf_counter()
    model = make_model(arguments.shape, arguments.device, torch.bfloat16 if is_cuda else torch.float32)
    print(f"model in {time.perf_counter() - begin:.1f} s", flush=True)
    rate = bandwidth_gbs() if is_cuda else None
    if is_cuda:
        batch = arguments.batches[0]
        cache = BoundedCache(model, memory_size=arguments.memory_size)
        for tokens, what in ((1, "first token"), (4, "first replay")):
            seconds = generate_seconds(model, cache, batch, 0, tokens)
            case = f"{arguments.shape} B={batch} after loading"
            report("decode", [Measurement(case, f"ours, {what}", seconds, "s")])
        del cache
    points: dict[str, list[tuple[int, float]]] = {}
    for batch in arguments.batches:
        for context in arguments.contexts or [arguments.context]:
            rows = (
                measure_in_turns(arguments, model, batch, context)
                if rate is None
                else measure(arguments, model, batch, context, rate)
            )
            for row in rows:
                points.setdefault(row.contender, []).append((context, 1e3 * batch / row.value))
    if arguments.plot:
        plot(points, arguments.plot)


if __name__ == "__main__":
    main()
