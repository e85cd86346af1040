"""The arguments of `retention-gates generate`."""

import argparse

from retention_gates.recipes.arguments.shared import add_model_arguments


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model_arguments(parser, adapter_required=False)
    prompt = parser.add_mutually_exclusive_group(required=True)
    prompt.add_argument("text", nargs="?", metavar="PROMPT", help="what to go on from")
    prompt.add_argument("--prompt", metavar="TEXT", help="the same, for scripts")
    prompt.add_argument("--prompt-file", metavar="FILE", help="the same from a file, UTF-8")
    parser.add_argument("--chat", action="store_true", help="the prompt is a user's message, in the model's chat form")
    parser.add_argument(
        "--memory-size", type=int, metavar="M", help="entries kept per KV head, in the mean (default: 64)"
    )
    parser.add_argument(
        "--policy", help="retention (the trained gates), streaming_llm, h2o, snapkv, ... (default: retention)"
    )
    parser.add_argument(
        "--budgets",
        help="uniform, calibrated, pyramid, adaptive or global (default: calibrated if the adapter has been, else "
        "uniform)",
    )
    parser.add_argument(
        "--cache-dtype", metavar="KIND", help="int8 or fp8: keys and values in 8 bits (default: as the model has them)"
    )
    parser.add_argument(
        "--prefill-chunk-size",
        type=int,
        metavar="T",
        help="tokens of the prompt read at a time (default: all, or 4096 beyond 32768)",
    )
    parser.add_argument(
        "--memory", metavar="FILE", help="a memory to go on from, of the same model and adapter; it brings its options"
    )
    parser.add_argument(
        "--save-memory", metavar="FILE", help="read the prompt, write what is kept to FILE and generate nothing"
    )
    parser.add_argument(
        "--compare-full-cache", action="store_true",
        help="then the same prompt once more with gates off and a full cache, each text under a heading",
    )  # fmt: skip
    parser.add_argument("--max-new-tokens", type=int, default=200, metavar="N", help="at most so many (default: 200)")
    parser.add_argument(
        "--temperature", type=float, default=0.0, help="of sampling; 0 takes the likeliest token (default: 0)"
    )
    parser.add_argument("--seed", type=int, default=0, help="of sampling and of the policy random (default: 0)")
