"""Measures the time to compare 10 policies at 4 budgets on 16 rows of 2,048 tokens of a model of SmolLM2-135M's shape.

    python recipes/bench/evaluation.py                        # on a GPU, bf16: the goal is 60 s
    python recipes/bench/evaluation.py --rows 2 --length 512  # a smaller one
    python recipes/bench/evaluation.py --each                 # each policy by itself, too

Weights are random, which changes no time. A policy by itself includes a full cache's forward pass.
"""

import argparse
import time
from typing import Any

import torch
from peft import get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

from retention_gates import RetentionGateConfig
from retention_gates.recipes.bench.harness import SMOLLM2_135M, Measurement, report
from retention_gates.trainers.evaluation.contenders import contenders
from retention_gates.trainers.evaluation.text import compare_rows

POLICIES = ["retention", "streaming_llm", "random", "key_norm", "h2o", "tova", "snapkv", "morphkv", "keydiff", "rkv"]
SIZES = [32, 64, 128, 256]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=16)
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--policies", nargs="+", default=POLICIES)
    parser.add_argument("--each", action="store_true", help="time each policy by itself as well")
    options = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    config = LlamaConfig(**SMOLLM2_135M)
    torch.manual_seed(0)
    base: Any = LlamaForCausalLM(config)
    model = get_peft_model(base.to(device, dtype), RetentionGateConfig()).eval()
    rows = torch.randint(0, config.vocab_size, (options.rows, options.length))
    case = f"{options.rows} rows of {options.length}, M={','.join(map(str, SIZES))}"

    def seconds(policies: list[str]) -> float:
        begin = time.monotonic()
        compare_rows(model, rows, contenders(policies, SIZES, ["uniform"]), batch_size=options.rows)
        print(f"{' '.join(policies)}: {time.monotonic() - begin:.1f} s", flush=True)
        return time.monotonic() - begin

    # the first call compiles kernels and fills caches
    compare_rows(model, rows[:, :64], contenders(["random"], [32], ["uniform"]), batch_size=options.rows)
    report("evaluation", [Measurement(case, f"all {len(options.policies)}", seconds(options.policies), "s")])
    for policy in options.policies if options.each else []:
        report("evaluation", [Measurement(case, policy, seconds([policy]), "s")])


if __name__ == "__main__":
    main()
