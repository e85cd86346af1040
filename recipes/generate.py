"""Generates text with a memory of fixed size; the text goes to stdout, one line of figures to stderr.

retention-gates generate --adapter user/adapter --memory-size 64 "Once upon a time"
retention-gates generate --adapter user/adapter --memory-size 512 --prompt-file book.txt --save-memory book.memory
retention-gates generate --adapter user/adapter --memory book.memory "Who found the map? It was"
retention-gates generate --adapter user/adapter --compare-full-cache "Once upon a time"
"""

import argparse
import sys
import time
from itertools import takewhile
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase, TextStreamer

from retention_gates.data.files import check_text
from retention_gates.data.tokens import document_prefix
from retention_gates.gates.adapter import generate_arguments
from retention_gates.gates.adapter.model import find_gated_model
from retention_gates.gates.cache.bounded_cache import BoundedCache
from retention_gates.gates.cache.saved_cache_checks import read_memory_header
from retention_gates.recipes.loading.models import base_name, check_gates_trained, load_model, load_tokenizer

MEMORY_SIZE = 64  # entries per KV head, unless the caller says
# The likeliest token each time, whatever the model's generation_config.json asks for.
GREEDY = {
    "do_sample": False,
    "temperature": None,
    "top_p": None,
    "top_k": None,
    "repetition_penalty": 1.0,
    "num_beams": 1,
    "no_repeat_ngram_size": 0,
}


def main(options: argparse.Namespace) -> None:
    for name in ("memory_size", "max_new_tokens", "prefill_chunk_size"):
        if getattr(options, name) is not None and getattr(options, name) < 1:
            raise ValueError(f"--{name.replace('_', '-')} {getattr(options, name)} must be 1 or more.")
    if not 0 <= options.temperature < float("inf"):
        raise ValueError(f"--temperature {options.temperature} must be 0 or more, and finite.")
    if options.compare_full_cache and (options.memory is not None or options.save_memory is not None):
        raise ValueError(
            "--compare-full-cache goes without --memory and --save-memory: a full cache needs the whole text, which a "
            "memory does not hold. Give it with --prompt or --prompt-file."
        )
    policy = options.policy or "retention"
    if options.memory is not None:
        policy = read_memory_header(options.memory)[1].policy
    check_gates_trained([policy], options.adapter)
    prompt = _prompt(options)

    name = base_name(options.model, options.adapter)
    tokenizer = load_tokenizer(name, gguf_file=options.gguf_file)
    ids = prompt_ids(
        tokenizer,
        prompt,
        chat=options.chat,
        goes_on=options.memory is not None,
        is_answered=options.save_memory is None,
    )
    model = load_model(name, options.adapter, gguf_file=options.gguf_file, device=options.device, dtype=options.dtype)
    if options.memory is not None:
        names = ("memory_size", "policy", "budgets", "cache_dtype")
        cache = BoundedCache.load(model, options.memory, **{name: getattr(options, name) for name in names})
    else:
        size = MEMORY_SIZE if options.memory_size is None else options.memory_size
        cache = BoundedCache(
            model, size, policy=policy, budgets=options.budgets, seed=options.seed, cache_dtype=options.cache_dtype
        )
    past = int(cache.get_seq_length())
    inputs = torch.tensor([ids], device=model.device)
    if options.save_memory is not None:
        read_text(model, cache, inputs, options.prefill_chunk_size)
        cache.save(options.save_memory)
        seen = past + len(ids)
        print(f"{options.save_memory} holds {seen} tokens read; {_held(cache, seen)}", file=sys.stderr)
        return
    if options.compare_full_cache:
        print(f"=== {cache.memory_size} entries per head", flush=True)
    chunks = {} if options.prefill_chunk_size is None else {"prefill_chunk_size": options.prefill_chunk_size}
    output, times = _write_on(model, tokenizer, inputs, options, past=past, past_key_values=cache, **chunks)
    tokens = past + output.shape[1]
    print(_figures(_held(cache, tokens - 1), tokens, times), file=sys.stderr)  # the last token never enters
    if options.compare_full_cache:
        print("\n=== full cache, gates off", flush=True)
        with model.disable_adapter():
            full, times = _write_on(model, tokenizer, inputs, options)
        size = full_cache_bytes(cache, full.shape[1] - 1)
        held = f"all {full.shape[1] - 1} entries per head; {size / 2**20:.2f} MiB held"
        print(_figures(held, full.shape[1], times), file=sys.stderr)
        print(_agreement(output[0, len(ids) :].tolist(), full[0, len(ids) :].tolist()), file=sys.stderr)


def _write_on(
    model: Any,
    tokenizer: "PreTrainedTokenizerBase",
    inputs: "torch.Tensor",
    options: argparse.Namespace,
    *,
    past: int = 0,
    **settings: Any,
) -> "tuple[torch.Tensor, list[float]]":
    """Writes to stdout what the model goes on with; gives all tokens [1, T], and when the new ones came.

    Args:
        inputs: [1, T]; `past` tokens stand before them.
    """

    sampling = {"do_sample": True, "temperature": options.temperature} if options.temperature > 0 else GREEDY
    torch.manual_seed(options.seed)
    streamer = _timed_streamer(tokenizer)
    output = model.generate(
        input_ids=inputs,
        attention_mask=torch.ones(1, past + inputs.shape[1], dtype=torch.int64, device=model.device),
        max_new_tokens=options.max_new_tokens,
        pad_token_id=tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id,
        streamer=streamer,
        **sampling,
        **settings,
    )
    return output, streamer.times


def _prompt(options: argparse.Namespace) -> str:
    if options.prompt_file is None:
        prompt: str = options.text if options.prompt is None else options.prompt
        check_text(prompt, "The prompt")
        return prompt
    try:
        return Path(options.prompt_file).read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"--prompt-file {options.prompt_file} cannot be read as UTF-8 text: {error}") from error


def prompt_ids(
    tokenizer: "PreTrainedTokenizerBase", prompt: str, *, chat: bool, goes_on: bool = False, is_answered: bool = True
) -> list[int]:
    """Token ids of a prompt, opened as the model's documents are, or as a user's turn in its chat template.

    Args:
        goes_on: whether a text stands before it, so that no document begins here.
        is_answered: whether the model's turn begins after it in the chat template.
    """

    if not prompt.strip():
        raise ValueError("The prompt is empty: give a text to go on from.")
    if not chat:
        prefix = [] if goes_on else document_prefix(tokenizer)
        return prefix + tokenizer.encode(prompt, add_special_tokens=False)
    if not tokenizer.chat_template:
        raise ValueError("The model's tokenizer has no chat template: leave --chat out.")
    turn = [{"role": "user", "content": prompt}]
    text = tokenizer.apply_chat_template(turn, add_generation_prompt=is_answered, tokenize=False)
    return tokenizer.encode(text, add_special_tokens=False)


def read_text(model: Any, cache: "BoundedCache", inputs: "torch.Tensor", chunk_size: int | None) -> None:
    """Lets the cache read tokens [B, T], some at a time, without making any."""
    gated, tokens = find_gated_model(model), inputs.shape[1]
    size = generate_arguments.chunk_size(chunk_size, tokens, seen=0) or tokens  # the model goes on where the cache is
    with (
        torch.no_grad(),
        tqdm(total=tokens, desc="reading", unit="tok", unit_scale=True, disable=tokens <= size) as bar,
    ):
        for chunk in inputs.split(size, dim=1):
            gated(input_ids=chunk, past_key_values=cache, use_cache=True, last_hidden_state_only=True)
            bar.update(chunk.shape[1])


def full_cache_bytes(cache: "BoundedCache", tokens: int) -> int:
    """Keys and values that a full cache would hold after so many tokens of each row, other layers as they are."""
    size = cache.memory_bytes()
    for layer in cache.gated_layers:
        widths = layer.entry_numbers * layer.dtype.itemsize
        size += layer.batch_size * tokens * len(layer.rule.budgets) * widths - layer.memory_bytes()
    return size


def _figures(held: str, tokens: int, times: list[float]) -> str:
    """Entries, bytes and speed in one line. `times`: of the prompt's start and of every new token."""
    new = len(times) - 1
    # the first token pays for the prompt, so that speed is measured between new tokens where there are two
    first, count = (times[1], new - 1) if new > 1 else (times[0], new)
    speed = count / max(times[-1] - first, 1e-9)
    return f"{held} after {tokens} tokens; {speed:.1f} tokens/s"


def _agreement(bounded: list[int], full: list[int]) -> str:
    """Counts the tokens for which two continuations stay the same."""
    if bounded == full:
        return f"both continuations have the same {len(full)} tokens"
    same = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(bounded, full, strict=False)))
    return f"the first {same} of {len(full)} new tokens are those of the full cache"


def _held(cache: "BoundedCache", tokens: int) -> str:
    """Entries and bytes, beside those of a full cache that has read so many tokens."""
    entries = [budget for row in cache.budgets for budget in row]
    spread = f" ({min(entries)} to {max(entries)})" if min(entries) != max(entries) else ""
    held, full = cache.memory_bytes(), full_cache_bytes(cache, tokens)
    return (
        f"{cache.memory_size} entries per head{spread}; {held / 2**20:.2f} MiB held, a full cache would hold "
        f"{full / 2**20:.2f} MiB"
    )


def _timed_streamer(tokenizer: "PreTrainedTokenizerBase") -> Any:
    class TimedStreamer(TextStreamer):
        """Writes words to stdout as they come and notes when each token did."""

        def __init__(self) -> None:
            super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
            self.times: list[float] = []

        def put(self, value: "torch.Tensor") -> None:
            self.times.append(time.monotonic())
            super().put(value)

    return TimedStreamer()
