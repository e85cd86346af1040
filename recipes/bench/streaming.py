"""Time and memory of a stream without end: a small model goes on and on with one cache.

    python recipes/bench/streaming.py                              # 1,000,000 tokens; SmolLM2-135M's shape on CUDA
    python recipes/bench/streaming.py --chunk 512                  # the same number read, 512 by 512
    python recipes/bench/streaming.py --device cpu --tokens 50000  # a tiny model

Random weights; every token is the likeliest after the one before, one at a time, or random ones are read in chunks.
Each tenth of the stream is timed as a whole (on a CPU in CPU time), after a warm-up of a hundredth; "last" over
"first" is the figure that has to stay at 1. Memory is what the cache holds and, on CUDA, what is allocated at most
during the tenth; on a CPU, the peak of the process.
"""

import argparse
import resource
import time
from functools import partial
from typing import Any

import torch
from peft import PeftModel, get_peft_model
from tqdm.auto import trange
from transformers import AutoModelForCausalLM, LlamaConfig

from retention_gates import BoundedCache, RetentionGateConfig
from retention_gates.recipes.bench.harness import SMOLLM2_135M, Measurement, report

TINY = SMOLLM2_135M | {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "vocab_size": 512}
TINY |= {"num_attention_heads": 4, "num_key_value_heads": 2}
TENTHS = 10


def make_model(shape: dict[str, Any], device: str) -> PeftModel:
    torch.manual_seed(0)
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    with torch.device(device):
        base = AutoModelForCausalLM.from_config(LlamaConfig(**shape), dtype=dtype, attn_implementation="sdpa")
    return get_peft_model(base, RetentionGateConfig(gate_width=128)).eval()


@torch.no_grad()
def read(model: PeftModel, cache: BoundedCache, last: torch.Tensor, tokens: int, chunk: int) -> torch.Tensor:
    """So many tokens more, random ones, `chunk` at a time; gives the last one, [1, 1]."""
    for _ in trange(tokens // chunk, unit="chunk", mininterval=5, leave=False):
        ids = torch.randint(model.config.vocab_size, (1, chunk), device=last.device)
        last = model(input_ids=ids, past_key_values=cache, logits_to_keep=1).logits.argmax(-1)
    return last


@torch.no_grad()
def go_on(model: PeftModel, cache: BoundedCache, last: torch.Tensor, tokens: int) -> torch.Tensor:
    """So many tokens more, each the likeliest; gives the last one, [1, 1]."""
    for _ in trange(tokens, unit="tok", unit_scale=True, mininterval=5, leave=False):
        last = model(input_ids=last, past_key_values=cache).logits[:, -1:].argmax(-1)
    return last


def peak_mib(device: str) -> float:
    if device == "cuda":
        return torch.cuda.max_memory_allocated() / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10  # KiB on Linux


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=1_000_000)
    parser.add_argument("--memory-size", type=int, default=256)
    parser.add_argument("--chunk", type=int, help="read so many tokens at a time (default: generate one by one)")
    parser.add_argument("--device", default="cuda")
    options = parser.parse_args()
    chunk = 1 if options.chunk is None else options.chunk
    if chunk < 1:
        parser.error(f"--chunk {chunk} must be at least 1 token")
    device, part = options.device, options.tokens // TENTHS // chunk * chunk
    if part == 0:
        parser.error(f"a tenth of {options.tokens} tokens is less than one chunk of {chunk}")
    step = go_on if options.chunk is None else partial(read, chunk=chunk)
    model = make_model(SMOLLM2_135M if device == "cuda" else TINY, device)
    cache = BoundedCache(model, options.memory_size)
    last = torch.ones(1, 1, dtype=torch.int64, device=device)
    clock = time.perf_counter if device == "cuda" else time.process_time
    least = max(options.memory_size + 2, options.tokens // 100)  # at least until every head is full
    warm = -(-least // chunk) * chunk
    last = step(model, cache, last, warm)
    milliseconds, peaks, held = [], [], []
    for _ in range(TENTHS):
        if device == "cuda":
            torch.cuda.reset_peak_memory_stats()
        begin = clock()
        last = step(model, cache, last, part)
        last.item()  # waits for the device
        milliseconds.append((clock() - begin) * 1e3 / part)
        peaks.append(peak_mib(device))
        held.append(cache.memory_bytes() / 2**20)
    seen = warm + part * TENTHS
    if int(cache.get_seq_length()) != seen or len(set(held)) != 1:
        raise SystemExit(f"the cache counts {int(cache.get_seq_length())} tokens of {seen} and holds {held} MiB")
    how = "" if options.chunk is None else f" read by {chunk}"
    case = (
        f"{part * TENTHS} tokens{how}, M={options.memory_size}, {'SmolLM2-135M shape' if device == 'cuda' else 'tiny'}"
    )
    measured = [
        Measurement(case, f"ours, tenth {tenth + 1}", value, "ms", peak_mib=peaks[tenth])
        for tenth, value in enumerate(milliseconds)
    ]
    report("streaming", measured)
    print(f"last tenth over first: {milliseconds[-1] / milliseconds[0]:.3f} times the ms per token, ", end="")
    print(f"{peaks[-1] - peaks[0]:+.1f} MiB of peak memory; the cache holds {held[0]:.2f} MiB throughout")


if __name__ == "__main__":
    main()
