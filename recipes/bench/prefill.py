"""Time and memory of reading a long prompt in chunks: one attention layer in Qwen3-4B's shape, batch 1, bf16.

    python recipes/bench/prefill.py                                # 32K and 131K tokens
    python recipes/bench/prefill.py --device cpu --tokens 2048 --chunk 512 --memory-size 128    # checks, no table

"ours" is the cache's layer with all that it does to a chunk: it attends, scores and evicts. The rival is flash
attention over a full cache that is allocated beforehand, in the same chunks, and over the whole prompt at once. Before
anything is timed, the second chunk must give what fp32 attention over the same entries gives. Memory is what is
allocated at most above queries, keys and values of the prompt, and caches. The goal: at most 1.1 times the time of the
full cache in chunks, and as much memory at 131K tokens as at 32K.
"""

import argparse
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention.bias import causal_lower_right

from retention_gates.gates.attention.chunked import attend_in_blocks
from retention_gates.gates.cache.slot_layer import SlotLayer
from retention_gates.gates.policies import RETENTION
from retention_gates.gates.policies.eviction_rule import EvictionRule
from retention_gates.kernels.softmax import Softmax
from retention_gates.recipes.bench.harness import Measurement, peak_mib, report, time_ms

HEADS, GROUP, HEAD_DIM = 8, 4, 128
SCALE = HEAD_DIM**-0.5
OWNER = nn.Identity()


class Prompt:
    """Queries, keys, values and log_beta of a prompt; half-lives are a few to some thousand tokens."""

    def __init__(self, tokens: int, device: str, dtype: torch.dtype):
        generator = torch.Generator(device).manual_seed(0)

        def randn(heads: int) -> Tensor:
            return torch.randn(1, heads, tokens, HEAD_DIM, generator=generator, device=device, dtype=dtype)

        self.tokens = tokens
        self.query, self.key, self.value = randn(HEADS * GROUP), randn(HEADS), randn(HEADS)
        half_life = (8 * torch.rand(1, HEADS, tokens, generator=generator, device=device) + 1).exp()
        self.log_beta = -torch.log(torch.tensor(2.0)) / half_life

    def chunks(self, size: int) -> list[slice]:
        return [slice(first, min(first + size, self.tokens)) for first in range(0, self.tokens, size)]


def make_layer(budgets: tuple[int, ...]) -> SlotLayer:
    return SlotLayer(EvictionRule(RETENTION, budgets, 1, ((0, 4),), 0, 0), OWNER)


def read_chunk(layer: SlotLayer, prompt: Prompt, now: slice) -> Tensor:
    layer.begin(OWNER, now.stop - now.start)
    key, value = layer.update(prompt.key[:, :, now], prompt.value[:, :, now])
    return layer.attend(prompt.query[:, :, now], key, value, prompt.log_beta[:, :, now], None, Softmax(SCALE))


def read(prompt: Prompt, size: int, budgets: tuple[int, ...]) -> Callable[[], object]:
    layer = make_layer(budgets)

    def run() -> None:
        layer.reset()
        for now in prompt.chunks(size):
            read_chunk(layer, prompt, now)

    return run


def read_full(prompt: Prompt, size: int) -> Callable[[], object]:
    """Every chunk attends to all before it; the cache is as long as the prompt from the start."""
    keys, values = torch.empty_like(prompt.key), torch.empty_like(prompt.value)

    def run() -> None:
        for now in prompt.chunks(size):
            keys[:, :, now], values[:, :, now] = prompt.key[:, :, now], prompt.value[:, :, now]
            past = keys[:, :, : now.stop], values[:, :, : now.stop]
            mask = causal_lower_right(now.stop - now.start, now.stop)
            F.scaled_dot_product_attention(prompt.query[:, :, now], *past, mask, scale=SCALE, enable_gqa=True)

    return run


def read_at_once(prompt: Prompt) -> Callable[[], object]:
    inputs = prompt.query, prompt.key, prompt.value
    return lambda: F.scaled_dot_product_attention(*inputs, is_causal=True, scale=SCALE, enable_gqa=True)


def check(prompt: Prompt, size: int, budgets: tuple[int, ...]) -> float:
    """The largest error of the second chunk's output, which attends to slots; exits if it is large."""
    layer = make_layer(budgets)
    first, second = prompt.chunks(size)[:2]
    read_chunk(layer, prompt, first)
    slots = layer.keys.clone().float(), layer.values.clone().float(), layer.slot_positions.clone()
    output = read_chunk(layer, prompt, second)
    positions = torch.arange(second.start, second.stop, device=output.device)[None]
    chunk = prompt.key[:, :, second].float(), prompt.value[:, :, second].float(), positions
    query = prompt.query[:, :, second].float()
    expected = attend_in_blocks(query, slots, chunk, layer.head_offsets, Softmax(SCALE))
    error = float((output - expected).abs().max())
    held = [int((layer.positions(head) >= 0).sum()) for head in range(HEADS)]
    if not error < 0.03 or held != list(budgets):
        raise SystemExit(f"the second chunk is off by {error}, and heads hold {held} entries of {list(budgets)}")
    return error


def ragged(mean: int) -> tuple[int, ...]:
    """Budgets that rise from an eighth of the mean, with the same sum as equal ones."""
    steps = [mean // 8 + head * (2 * mean - mean // 4) // (HEADS - 1) for head in range(HEADS)]
    return (*steps[:-1], HEADS * mean - sum(steps[:-1]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, nargs="+", default=[32_768, 131_072])
    parser.add_argument("--chunk", type=int, default=4096)
    parser.add_argument("--memory-size", type=int, default=1024)
    parser.add_argument("--device", default="cuda")
    options = parser.parse_args()
    size, mean = options.chunk, options.memory_size
    dtype = torch.bfloat16 if options.device == "cuda" else torch.float32
    if options.device == "cuda":
        torch.backends.cuda.enable_cudnn_sdp(False)  # it plans anew for every length of the past
    measured: list[Measurement] = []
    peaks: list[float] = []
    for tokens in options.tokens:
        prompt = Prompt(tokens, options.device, dtype)
        budgets = {"uniform": (mean,) * HEADS, "ragged": ragged(mean)}
        errors = {name: check(prompt, size, row) for name, row in budgets.items()}
        if options.device != "cuda":
            print(f"T={tokens}: largest errors {errors}")
            continue
        contenders = {f"ours, {name} M={mean}": read(prompt, size, row) for name, row in budgets.items()}
        contenders |= {"full cache, in chunks": read_full(prompt, size), "whole prompt": read_at_once(prompt)}
        case = f"T={tokens} chunk={size} HQ={HEADS * GROUP} H={HEADS} D={HEAD_DIM} bf16"
        for contender, run in contenders.items():
            milliseconds, spread = time_ms(run, warmup=2, repeats=7)
            peak, error = peak_mib(run), errors.get(contender.split()[1])
            measured.append(Measurement(case, contender, milliseconds, "ms", spread, None, peak, error))
            peaks += [peak] if contender.startswith("ours, uniform") else []
    if measured:
        report("prefill", measured)
        for rows in (measured[i : i + 4] for i in range(0, len(measured), 4)):
            ratios = " and ".join(f"{ours.value / rows[2].value:.2f}" for ours in rows[:2])
            print(f"{rows[0].case}: uniform and ragged {ratios} times the full cache in chunks")
        print(f"peaks of ours, uniform, over {options.tokens} tokens: {[round(peak, 1) for peak in peaks]} MiB")


if __name__ == "__main__":
    main()
