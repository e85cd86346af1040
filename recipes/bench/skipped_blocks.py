"""Measures what trained gates gain from skipping blocks without weight, on the queries and keys of a real text.

    python recipes/bench/skipped_blocks.py --adapter out/run/adapter --length 8192

For every gated layer: the share of blocks that the forward pass visits, and the time of forward and backward pass with
and without skipping, on the same inputs; the median of 5 calls after one that is not timed, as each call is steady and
there are two for every layer. The sum over layers is reported. In bf16, as gates are trained, unless --dtype says
otherwise: "auto" makes fp32 of a GGUF file, whose kernels take several times as long to compile and to run.
"""

import argparse
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from multiprocessing import get_context
from typing import Any

import torch

from retention_gates.gates.adapter.model import find_gated_model
from retention_gates.gates.attention import interface as gated_attention
from retention_gates.kernels.retention_attention import fused, retention_attention
from retention_gates.recipes.arguments.shared import add_model_arguments, add_text_arguments
from retention_gates.recipes.bench.harness import Measurement, report, time_ms
from retention_gates.recipes.loading.models import base_name, load_model, load_tokenizer
from retention_gates.recipes.loading.rows import load_rows, load_token_documents

NEVER = 2**62  # tokens


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_model_arguments(parser, adapter_required=True)
    add_text_arguments(parser, rows=1, length=8192, rows_option="--rows")
    parser.set_defaults(dtype="bfloat16")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("this benchmark needs a CUDA device.")
    begun = time.perf_counter()

    def progress(text: str) -> None:
        print(f"{time.perf_counter() - begun:6.1f} s  {text}", flush=True)

    name = base_name(options.model, options.adapter)
    # a GGUF file is read by Python alone, which takes its time: for the tokenizer in a process beside this one
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as beside:
        reading = beside.submit(read_rows, name, options)
        model = load_model(name, options.adapter, gguf_file=options.gguf_file, device="cuda", dtype=options.dtype)
        progress("model loaded")
        rows = reading.result()
    progress("text read")
    layers = attention_inputs(model, rows.cuda())
    visited, times = [], []
    for index, arguments in enumerate(layers):
        run = both_passes(arguments)
        with skipping_from(NEVER):
            everything, _ = time_ms(run, warmup=1, repeats=5)
        with skipping_from(0):
            skipping, _ = time_ms(run, warmup=1, repeats=5)
            visited.append(share_visited(arguments))
        times.append((everything, skipping))
        progress(f"layer {index}: all {everything:.3f} ms, skipping {skipping:.3f} ms, visits {visited[-1]:.3f}")
    dtype = str(layers[0]["query"].dtype).removeprefix("torch.")
    case = f"{name.rpartition('/')[2]}, {len(layers)} layers, T={options.length} {dtype}"
    found = [
        Measurement(case + " fwd+bwd", contender, sum(column), "ms")
        for contender, column in zip(("all blocks", "skipping"), zip(*times, strict=True), strict=True)
    ]
    found.append(Measurement(case, "blocks visited, mean", sum(visited) / len(visited), "share"))
    found.append(Measurement(case, "blocks visited, least of a layer", min(visited), "share"))
    report("skipped_blocks", found)


def read_rows(name: str, options: argparse.Namespace) -> torch.Tensor:
    tokenizer = load_tokenizer(name, gguf_file=options.gguf_file)
    return load_rows(options, tokenizer, load_token_documents(options, tokenizer))


def attention_inputs(model: Any, rows: torch.Tensor) -> list[dict[str, Any]]:
    """Arguments of the training attention of every gated layer in one forward pass."""
    seen = []

    def recording(*tensors: torch.Tensor, **options: Any) -> torch.Tensor:
        names = ("query", "key", "value", "log_beta")
        seen.append({**dict(zip(names, (t.detach() for t in tensors), strict=True)), **options})
        return retention_attention(*tensors, **options)

    original, gated_attention.retention_attention = gated_attention.retention_attention, recording
    try:
        with torch.no_grad():
            find_gated_model(model)(input_ids=rows, use_cache=False, last_hidden_state_only=True)
    finally:
        gated_attention.retention_attention = original
    return seen


@contextmanager
def skipping_from(tokens: int) -> Iterator[None]:
    """Inside of it, blocks are skipped in rows of at least so many tokens."""
    before, fused.LEAST_TOKENS = fused.LEAST_TOKENS, tokens
    try:
        yield
    finally:
        fused.LEAST_TOKENS = before


def both_passes(arguments: dict[str, Any]) -> Callable[[], Any]:
    names = ("query", "key", "value", "log_beta")
    inputs = {name: arguments[name].requires_grad_() for name in names}
    gradient = torch.randn_like(arguments["query"])
    return lambda: torch.autograd.grad(retention_attention(**(arguments | inputs)), list(inputs.values()), gradient)


def share_visited(arguments: dict[str, Any]) -> float:
    """Whole blocks of 64 keys that blocks of 64 queries visit, over those that lie before them."""
    query, key, scale = arguments["query"], arguments["key"], arguments["scale"]
    rates = fused._rates(arguments["log_beta"].detach(), scale, None, False)
    block_dim, *_ = fused._blocks(query, arguments["value"])
    bounds = fused._bounds(query, key, rates, None, None, None, scale, arguments.get("softcap"), False, block_dim)
    assert bounds is not None
    _, counts = bounds.key_blocks(64, 64)
    blocks = counts.shape[1]
    return counts.sum().item() / (counts.shape[0] * blocks * (blocks - 1) / 2)


if __name__ == "__main__":
    main()
