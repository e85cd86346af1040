"""Measures what bounded memory loses on a real model, through `BoundedCache`: budgets, and entries of 8 bits.

    python recipes/bench/cache_quality.py --adapter out/demo/adapter --memory-size 64

The simulation that `retention-gates evaluate` runs cannot see global budgets and what is lost where entries are
stored, so everything here is decoded: passages of the test text, the first --start tokens in one pass and the rest one
token at a time, all passages side by side. KL(full || bounded) is the mean over the latter in nats per token, with its
standard error over passages. Recall: the prompt of a seeded task in one pass, then the answer token by token; a score
of 1 means that every token of the answer was the likeliest.
"""

import argparse
import time
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedTokenizerBase

from retention_gates import BoundedCache
from retention_gates.data.tasks import build_task
from retention_gates.recipes.arguments.shared import add_model_arguments, add_text_arguments
from retention_gates.recipes.bench.harness import Measurement, report
from retention_gates.recipes.loading.models import base_name, load_model, load_tokenizer
from retention_gates.recipes.loading.rows import load_rows, load_token_documents

CONTENDERS: dict[str, dict[str, Any]] = {
    "calibrated": {"budgets": "calibrated"},
    "calibrated, int8": {"budgets": "calibrated", "cache_dtype": "int8"},
    "calibrated, fp8": {"budgets": "calibrated", "cache_dtype": "fp8"},
    "global": {"budgets": "global"},
    "adaptive": {"budgets": "adaptive"},
    "uniform": {"budgets": "uniform"},
}


@torch.no_grad()
def full_logits(model: Any, rows: Tensor, start: int) -> Tensor:
    """Of the base model after each of the tokens start..T-2, [R, T - start - 1, V] in 16 bits."""
    with model.disable_adapter():
        return torch.cat([model(input_ids=row[None]).logits[:, start:-1].bfloat16() for row in rows])


@torch.no_grad()
def text_loss(model: nn.Module, cache: BoundedCache, rows: Tensor, full: Tensor, start: int) -> Tensor:
    """KL(full || bounded) of each row, [R], over the tokens from start on."""
    model(input_ids=rows[:, :start], past_key_values=cache, logits_to_keep=1)
    total = torch.zeros(len(rows), dtype=torch.float64)
    for step in range(start, rows.shape[1] - 1):
        logits = model(input_ids=rows[:, step : step + 1], past_key_values=cache).logits[:, 0].float()
        target = full[:, step - start].float().log_softmax(-1)
        total += (target.exp() * (target - logits.log_softmax(-1))).sum(-1).double().cpu()
    return total / full.shape[1]


@torch.no_grad()
def recalled(model: Any, cache: Any, prompt: list[int], answer: list[int]) -> bool:
    """Whether every token of the answer is the likeliest after those before it."""
    ids = torch.tensor([prompt + answer], device=model.device)
    logits = model(input_ids=ids[:, : len(prompt)], past_key_values=cache, logits_to_keep=1).logits
    for place, token in enumerate(answer, start=len(prompt)):
        if int(logits[0, -1].argmax()) != token:
            return False
        logits = model(input_ids=ids[:, place : place + 1], past_key_values=cache).logits
    return True


def spread_of(cache: BoundedCache) -> str:
    """Measures how unequal the heads and the layers of global budgets are at the end."""
    counts = torch.stack(
        [
            torch.stack([(layer.positions(head) >= 0).sum(1) for head in range(layer.pool.heads)])
            for layer in cache.gated_layers
        ]
    ).float()  # [L, H, R]
    share = counts.mean(1) / cache.memory_size
    return (
        f"heads hold {int(counts.min())} to {int(counts.max())} entries, layers up to {share.max():.1f} times the mean"
    )


def measure_text(model: Any, rows: Tensor, options: argparse.Namespace) -> list[Measurement]:
    full = full_logits(model, rows, options.start)
    case, measured = f"KL, {len(rows)} x {rows.shape[1]} tokens, M={options.memory_size}", []
    for name in options.contenders:
        begin = time.perf_counter()
        cache = BoundedCache(model, options.memory_size, **CONTENDERS[name])
        losses = text_loss(model, cache, rows, full, options.start)
        error = float(losses.std() / len(rows) ** 0.5)
        measured.append(Measurement(case, name, float(losses.mean()), "nats", error))
        seconds = time.perf_counter() - begin
        print(f"{case} {name:20} {losses.mean():.4f} +- {error:.4f}; ", end="", flush=True)
        print(f"{cache.memory_bytes() / len(rows) / 2**20:.2f} MiB a row; {seconds:.0f} s", flush=True)
        if name == "global":
            print(f"  {spread_of(cache)}", flush=True)
    return measured


def measure_recall(
    model: Any, tokenizer: PreTrainedTokenizerBase, documents: Any, options: argparse.Namespace
) -> list[Measurement]:
    measured = []
    for name in options.tasks:
        examples = build_task(name).examples(tokenizer, documents, options.examples, options.task_length, 0, "test")
        case = f"{name}, {len(examples)} x {options.task_length} tokens, M={options.memory_size}"
        for contender in ("full cache", *options.contenders):
            score = 0.0
            for example in examples:
                if contender == "full cache":
                    with model.disable_adapter():
                        hit = recalled(model, DynamicCache(), example.prompt_ids, example.answer_ids)
                else:
                    cache = BoundedCache(model, options.memory_size, **CONTENDERS[contender])
                    hit = recalled(model, cache, example.prompt_ids, example.answer_ids)
                score += hit / len(examples)
            measured.append(Measurement(case, contender, score, "score"))
            print(f"{case} {contender:20} {score:.2f}", flush=True)
    return measured


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_model_arguments(parser, adapter_required=True)
    add_text_arguments(parser, rows=4, length=1024, rows_option="--documents")
    parser.add_argument("--start", type=int, default=256, metavar="T", help="tokens read in one pass (default: 256)")
    parser.add_argument("--memory-size", type=int, default=64, metavar="M")
    parser.add_argument("--tasks", nargs="*", default=["code_lookup", "passkey"], metavar="NAME")
    parser.add_argument("--examples", type=int, default=24, metavar="N")
    parser.add_argument("--task-length", type=int, default=512, metavar="T")
    parser.add_argument("--contenders", nargs="+", choices=CONTENDERS, default=list(CONTENDERS))
    options = parser.parse_args()
    name = base_name(options.model, options.adapter)
    tokenizer = load_tokenizer(name, gguf_file=options.gguf_file)
    model = load_model(name, options.adapter, gguf_file=options.gguf_file, device=options.device, dtype=options.dtype)
    documents = load_token_documents(options, tokenizer)
    rows = load_rows(options, tokenizer, documents).to(model.device)
    measured = measure_recall(model, tokenizer, documents, options) + measure_text(model, rows, options)
    report("cache_quality", measured)


if __name__ == "__main__":
    main()
