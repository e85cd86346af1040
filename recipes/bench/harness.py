"""The common part of every benchmark: device time, memory, one printed table, JSON lines."""

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import torch

from retention_gates.compat import cuda_sleep
from retention_gates.recipes.loading.provenance import commit

SLEEP_CYCLES = 5_000_000  # about 3 ms
_begun: set[str] = set()  # benches whose table has its head
RESULTS = Path(__file__).parent / "results"
SMOLLM2_135M: dict[str, Any] = {  # arguments of LlamaConfig
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "vocab_size": 49_152,
    "max_position_embeddings": 8192,
    "tie_word_embeddings": True,
}


@dataclass
class Measurement:
    """One contender on one case."""

    case: str  # such as "T=16384 HQ=32 H=8 D=128 bf16 fwd+bwd"
    contender: str  # "ours" or the rival's name
    value: float
    unit: str
    spread: float | None = None  # between the quartiles, in the same unit
    limit: float | None = None  # the physical limit, in the same unit
    peak_mib: float | None = None  # allocated above what was there before
    error: float | None = None  # against the fp64 reference, as the script says


def time_ms(function: Callable[[], Any], *, warmup: int = 3, repeats: int = 20) -> tuple[float, float]:
    """Median and spread between the quartiles of the time that the device needs for one call, in ms.

    The device is put to sleep before each call, so that the time that Python needs to launch is not measured.
    """
    for _ in range(warmup):
        function()
    begins, ends = ([torch.cuda.Event(enable_timing=True) for _ in range(repeats)] for _ in range(2))
    for begin, end in zip(begins, ends, strict=True):
        cuda_sleep(SLEEP_CYCLES)
        begin.record()
        function()
        end.record()
    torch.cuda.synchronize()
    times = [begin.elapsed_time(end) for begin, end in zip(begins, ends, strict=True)]
    low, _, high = quantiles(times, n=4) if repeats > 1 else (times[0],) * 3
    return median(times), high - low


def replayed_us(functions: Sequence[Callable[[], Any]], *, repeats: int = 20) -> tuple[float, float]:
    """Median and spread between the quartiles of the time of one of `functions`, in us, all captured in one graph.

    Without the time of launches from Python, and with the gaps between kernels that a graph leaves. Functions that
    read memory of their own, more than the cache holds in all, find none of it there.
    """
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for function in functions:  # what is compiled or allocated once must not be captured
            function()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for function in functions:
            function()
    milliseconds, spread = time_ms(graph.replay, repeats=repeats)
    return milliseconds * 1e3 / len(functions), spread * 1e3 / len(functions)


def peak_mib(function: Callable[[], Any]) -> float:
    """MiB that one call allocates at most, above what is allocated before it."""
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    function()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / 2**20


def matrix_tflops(size: int = 8192) -> float:
    """Measured rate of a bf16 matrix product on this device, in TFLOP/s: the limit that others are held against."""
    a, b = (torch.randn(size, size, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    milliseconds, _ = time_ms(lambda: a @ b)
    return 2 * size**3 / milliseconds / 1e9


def bandwidth_gbs(mib: int = 2048) -> float:
    """Measured rate of a copy on this device, bytes read plus bytes written, in GB/s."""
    source = torch.empty(mib * 2**20, device="cuda", dtype=torch.uint8).random_()
    target = torch.empty_like(source)
    milliseconds, _ = time_ms(lambda: target.copy_(source))
    return 2 * source.numel() / milliseconds / 1e6


def report(bench: str, measurements: Sequence[Measurement], results: Path = RESULTS) -> None:
    """Prints a table, which may come in parts, and appends a JSON object per measurement to results/<bench>.jsonl."""
    stamp = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    machine = {"gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None, "torch": torch.__version__}
    machine |= {"triton": _triton(), "commit": commit(), "time": stamp}
    results.mkdir(parents=True, exist_ok=True)
    with open(results / f"{bench}.jsonl", "a", encoding="utf-8") as lines:
        lines.writelines(json.dumps({"bench": bench} | asdict(each) | machine) + "\n" for each in measurements)
    if bench not in _begun:
        _begun.add(bench)
        print(f"{bench} on {machine['gpu'] or 'CPU'}, torch {machine['torch']}, triton {machine['triton']}")
        print(f"{'case':44} {'contender':28} {'value':>10} {'limit':>8} {'share':>6} {'MiB':>8} {'error':>8}")
    for each in measurements:
        # times are better small, rates large
        share = None if not each.limit else _share(each)
        cells = (_cell(each.limit), _cell(share, ".2f"), _cell(each.peak_mib, ".0f"), _cell(each.error, ".1e"))
        numbers = " ".join(f"{cell:>{width}}" for cell, width in zip(cells, (8, 6, 8, 8), strict=True))
        print(f"{each.case:44} {each.contender:28} {f'{each.value:.4g} {each.unit}':>10} {numbers}", flush=True)


def _share(each: Measurement) -> float:
    assert each.limit is not None
    return each.limit / each.value if each.unit in ("s", "ms", "us") else each.value / each.limit


def _cell(value: float | None, form: str = ".3g") -> str:
    return "" if value is None else format(value, form)


def _triton() -> str | None:
    try:
        return version("triton")
    except PackageNotFoundError:
        return None
