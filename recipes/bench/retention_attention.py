"""Retention-gated attention, forward and backward, against attention without a bias and FlexAttention with the bias.

    python recipes/bench/retention_attention.py            # checks, then the table; about 2 minutes on an H100
    python recipes/bench/retention_attention.py --sweep    # times of many tile sizes

Rates count what plain causal attention needs: 3.5 times the forward pass's two products over half the square.
"""

import argparse
import multiprocessing
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from retention_gates.kernels.retention_attention import fused, naive, retention_attention, tiles
from retention_gates.kernels.retention_attention.tiles import Tile
from retention_gates.recipes.bench.harness import Measurement, matrix_tflops, peak_mib, report, time_ms

HQ, H, D = 32, 8, 128
LENGTHS = (4096, 16384, 32768)
DOCUMENT = 2048


def make_inputs(tokens: int, *, heads: int = H, query_heads: int = HQ, dim: int = D, seed: int = 0) -> dict[str, Any]:
    """Random queries, keys and values, and gates of many half-lives, some of them infinite."""
    generator = torch.Generator("cuda").manual_seed(seed)
    random = partial(torch.randn, generator=generator, device="cuda")
    inputs = {
        "query": random(1, query_heads, tokens, dim).bfloat16(),
        "key": random(1, heads, tokens, dim).bfloat16(),
        "value": random(1, heads, tokens, dim).bfloat16(),
        "log_beta": F.logsigmoid(random(1, heads, tokens) * 3 + 6),
    }
    inputs["log_beta"][..., :4] = 0
    return {name: tensor.requires_grad_() for name, tensor in inputs.items()}


def flops(tokens: int) -> float:
    """Of forward and backward."""
    return 3.5 * 2 * 2 * HQ * D * tokens * tokens / 2


def both_passes(attend: Callable[[], Tensor], inputs: dict[str, Any], gradient: Tensor) -> Callable[[], Any]:
    return lambda: torch.autograd.grad(attend(), [x for x in inputs.values() if x.requires_grad], gradient)


def plain_attention(inputs: dict[str, Any], backend: SDPBackend) -> Callable[[], Tensor]:
    query, key, value = (inputs[name] for name in ("query", "key", "value"))

    def attend() -> Tensor:
        with sdpa_kernel(backend):
            return F.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)

    return attend


def decayed_flex_attention(inputs: dict[str, Any]) -> Callable[[], Tensor]:
    query, key, value, log_beta = inputs.values()
    group, tokens = query.shape[1] // key.shape[1], query.shape[2]
    mask = create_block_mask(lambda b, h, t, i: t >= i, None, None, tokens, tokens)

    def decayed(score: Any, b: Any, h: Any, t: Any, i: Any) -> Any:
        return score + (t - i) * log_beta[b, h // group, i]

    compiled = torch.compile(flex_attention)
    return lambda: compiled(query, key, value, score_mod=decayed, block_mask=mask, enable_gqa=True)


def check(tokens: int = 1000) -> float:
    """Largest relative error of output and gradients against fp64, as norms. Raises if one is too large."""
    inputs = make_inputs(tokens, seed=1)
    exact = {name: x.detach().double().requires_grad_() for name, x in inputs.items()}
    worst = 0.0
    results = []
    for attend, given in ((retention_attention, inputs), (naive.retention_attention, exact)):
        output = attend(**given, scale=D**-0.5)
        generator = torch.Generator("cuda").manual_seed(2)
        gradient = torch.randn(output.shape, generator=generator, device="cuda").to(output.dtype)
        results.append([output, *torch.autograd.grad(output, list(given.values()), gradient)])
    for name, ours, reference in zip(("output", *inputs), *results, strict=True):
        error = ((ours.double() - reference).norm() / reference.norm()).item()
        print(f"check: {name} differs by {error:.1e}")
        if not error < 1e-2:
            raise SystemExit(f"{name} is wrong: relative error {error}")
        worst = max(worst, error)
    return worst


def measure() -> Iterator[Measurement]:
    error = check()
    rate = matrix_tflops()
    print(f"matrix rate {rate:.0f} TFLOP/s")
    for tokens in LENGTHS:
        inputs = make_inputs(tokens)
        gradient = torch.randn_like(inputs["query"])
        plain = {name: inputs[name] for name in ("query", "key", "value")}
        ours = partial(retention_attention, **inputs, scale=D**-0.5, check_values=False)
        contenders: dict[str, tuple[Callable[[], Tensor], dict[str, Any]]] = {
            "ours": (ours, inputs),
            "cuDNN SDPA, no bias": (plain_attention(inputs, SDPBackend.CUDNN_ATTENTION), plain),
            "flash SDPA, no bias": (plain_attention(inputs, SDPBackend.FLASH_ATTENTION), plain),
        }
        if tokens == 16384:
            contenders["FlexAttention, score_mod"] = (decayed_flex_attention(inputs), inputs)
        case = f"T={tokens} HQ={HQ} H={H} D={D} bf16"
        limit = flops(tokens) / rate / 1e9
        for name, (attend, wanted) in contenders.items():
            with torch.no_grad():
                forward, spread = time_ms(attend)
            yield Measurement(case + " fwd", name, forward, "ms", spread, limit / 3.5)
            run = both_passes(attend, wanted, gradient)
            total, spread = time_ms(run)
            known = error if name == "ours" else None
            yield Measurement(case + " fwd+bwd", name, total, "ms", spread, limit, peak_mib(run), known)
    yield from packed(rate)
    yield from other_shapes(rate)


def packed(rate: float, tokens: int = 16384) -> Iterator[Measurement]:
    """Documents of 2,048 tokens: the limit is that share of the square's work which lies inside them."""
    inputs = make_inputs(tokens)
    gradient = torch.randn_like(inputs["query"])
    documents = (torch.arange(tokens, device="cuda") // DOCUMENT)[None]
    for name, ids in (("one document", None), (f"documents of {DOCUMENT}", documents)):
        run = both_passes(
            partial(retention_attention, **inputs, scale=D**-0.5, document_ids=ids, check_values=False),
            inputs,
            gradient,
        )
        total, spread = time_ms(run)
        share = 1.0 if ids is None else DOCUMENT / tokens
        yield Measurement(
            f"T={tokens} {name} fwd+bwd", "ours", total, "ms", spread, share * flops(tokens) / rate / 1e9
        )


def other_shapes(rate: float, tokens: int = 8192) -> Iterator[Measurement]:
    """Other head dims and groups, at the same number of operations a token."""
    for dim, query_heads, heads in ((64, 64, 16), (80, 32, 32), (96, 32, 32), (256, 16, 1)):
        inputs = make_inputs(tokens, heads=heads, query_heads=query_heads, dim=dim)
        gradient = torch.randn_like(inputs["query"])
        run = both_passes(
            partial(retention_attention, **inputs, scale=dim**-0.5, check_values=False), inputs, gradient
        )
        total, spread = time_ms(run)
        limit = 3.5 * 2 * query_heads * dim * tokens * tokens / rate / 1e9
        yield Measurement(
            f"T={tokens} HQ={query_heads} H={heads} D={dim} bf16 fwd+bwd", "ours", total, "ms", spread, limit
        )


# head dim -> kernel -> BM, BN, warps, stages
CANDIDATES = {
    64: {
        "forward": [
            (128, 64, 4, 3),
            (128, 128, 8, 2),
            (128, 128, 4, 2),
            (64, 64, 4, 3),
            (128, 64, 8, 3),
            (128, 128, 8, 3),
        ],
        "backward_keys": [(64, 128, 8, 2), (64, 128, 8, 3), (64, 64, 4, 2), (128, 128, 8, 2), (64, 64, 4, 3)],
        "backward_queries": [(128, 64, 4, 2), (128, 64, 8, 3), (64, 64, 4, 3), (128, 128, 8, 2), (128, 128, 8, 3)],
    },
    128: {
        "forward": [
            (128, 128, 8, 2),
            (128, 64, 8, 3),
            (64, 64, 4, 2),
            (64, 64, 4, 3),
            (64, 128, 4, 2),
            (128, 64, 8, 4),
        ],
        "backward_keys": [(64, 128, 8, 2), (64, 128, 8, 3), (64, 64, 4, 2), (32, 128, 8, 3), (32, 64, 4, 3)],
        "backward_queries": [(128, 64, 8, 2), (128, 128, 8, 2), (64, 64, 4, 2), (128, 64, 8, 3), (64, 64, 4, 3)],
    },
    256: {
        "forward": [(128, 64, 8, 2), (64, 64, 4, 2), (128, 32, 8, 3), (64, 32, 4, 2), (64, 64, 8, 2)],
        "backward_keys": [(32, 64, 8, 2), (64, 64, 8, 2), (64, 64, 8, 1), (32, 64, 4, 1), (32, 32, 4, 2)],
        "backward_queries": [(64, 32, 4, 2), (64, 64, 8, 2), (128, 32, 8, 2), (64, 64, 8, 1), (64, 32, 8, 2)],
    },
}


def run_one(dim: int, kernel: str, tile: Tile, tokens: int, timed: bool = False) -> float | str:
    """Time in ms of one kernel (backward_queries: with backward_keys) with a tile, or why it cannot run."""
    key = (dim, 2)
    before = tiles.TABLE[key]
    tiles.TABLE[key] = before._replace(**{kernel: tile})
    inputs = {
        n: x.detach() for n, x in make_inputs(tokens, dim=dim, query_heads=4096 // dim, heads=1024 // dim).items()
    }
    arguments = (*inputs.values(), None, None, None, None)
    assert fused  # whose import registers the operators
    ops = torch.ops.retention_gates
    try:
        numbers = (dim**-0.5, None, False)  # scale, no softcap, not gaussian
        output, lse = ops.retention_attention(*arguments, *numbers)
        run = partial(ops.retention_attention, *arguments, *numbers)
        if kernel != "forward":
            last = (output, lse, *numbers, kernel == "backward_queries", True)
            run = partial(ops.retention_attention_backward, torch.randn_like(output), *arguments, *last)
        run()
        torch.cuda.synchronize()
        return time_ms(run, repeats=7)[0] if timed else 0.0
    except Exception as error:  # a tile that does not fit is a result here
        return f"{type(error).__name__}: {str(error).splitlines()[0][:90]}"
    finally:
        tiles.TABLE[key] = before


def sweep(dims: list[int], tokens: int) -> None:
    jobs = [(dim, k, Tile(*t)) for dim in dims for k, given in CANDIDATES[dim].items() for t in given]
    context = multiprocessing.get_context("spawn")
    with context.Pool(14) as pool:  # compiles side by side; the cache on disk serves the timing below
        pool.starmap(run_one, [(*job, 256) for job in jobs], chunksize=1)
    for dim, kernel, tile in jobs:
        result = run_one(dim, kernel, tile, tokens, timed=True)
        shown = result if isinstance(result, str) else f"{result:.3f} ms"
        print(f"D={dim} {kernel:17} {tile} {shown}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sweep", type=int, nargs="*", metavar="D", help="time candidate tiles for these head dims")
    parser.add_argument("--tokens", type=int, default=16384, help="rows of the sweep (default: 16384)")
    options = parser.parse_args()
    if options.sweep is not None:
        sweep(options.sweep or list(CANDIDATES), options.tokens)
        return
    report("retention_attention", list(measure()))


if __name__ == "__main__":
    main()
