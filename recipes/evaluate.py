"""Compares policies and memory sizes with the full cache, on text and on recall tasks.

    retention-gates evaluate recipes/runs/compare_smollm2.yaml text.rows=4
    retention-gates evaluate --adapter out/adapter --memory-size 64 128 --output out/evaluation

The first takes everything from a YAML file, several models if it names them; the second has one model and options for
the rest, which may also follow a file. Both write to the output folder: report.html, report.md, score.png,
summary.jsonl (every mean), results.jsonl (a header, then one object per row and contender), and scores.jsonl, from
which a run that was stopped goes on and a later one takes what it has in common.
"""

import argparse
from pathlib import Path
from typing import Any

from retention_gates.gates.adapter.base_identity import display_name
from retention_gates.recipes.comparison import written_answers
from retention_gates.recipes.loading.arguments import add_model_arguments, add_text_arguments
from retention_gates.recipes.loading.models import base_name

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
        "overrides", nargs="*", metavar="section.key=value", help="replaces values of the file: text.rows=4"
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
        help="among uniform, calibrated, pyramid, adaptive (default: uniform, and calibrated if the adapter has been)",
    )
    parser.add_argument(
        "--tasks", nargs="+", default=[], metavar="NAME",
        help="recall tasks, such as passage_repeat, passkey:needles=3 or pitfalls (default: none)",
    )  # fmt: skip
    parser.add_argument(
        "--pin", action="store_true", help="of tasks with a system prompt: score each policy once more with it pinned"
    )
    parser.add_argument("--examples", type=int, default=16, metavar="N", help="of each task (default: 16)")
    parser.add_argument("--batch-size", type=int, default=1, metavar="B", help="rows per forward pass (default: 1)")
    parser.add_argument("--output", type=Path, metavar="DIR", help="folder for results and pictures")
    written_answers.add_arguments(parser)
    # what is not given is the file's, or else the comparison's own default, which is the one that the help tells
    names = (*OPTIONS, *MODEL_OPTIONS, *TASK_OPTIONS)
    parser.set_defaults(defaults={name: parser.get_default(name) for name in names})
    parser.set_defaults(**dict.fromkeys(names, NOT_GIVEN))


def main(options: argparse.Namespace) -> None:
    if written_answers.wanted(options):
        if options.config is not None:
            raise ValueError(f"--suites and --lm-eval go without a file: leave {options.config} out.")
        return written_answers.main(with_defaults(options))

    from retention_gates.recipes.comparison.comparison_config import build_comparison, read_comparison
    from retention_gates.recipes.comparison.run import run

    given = {name: value for name, value in vars(options).items() if value is not NOT_GIVEN}
    comparison = _from_model(given) if options.config is None else read_comparison(options.config, options.overrides)
    if options.config is not None and (named := [name for name in MODEL_OPTIONS if name in given]):
        raise ValueError(
            f"--{named[0].replace('_', '-')} goes without a file; with {options.config} say models.NAME."
            f"{MODEL_OPTIONS[named[0]]}=..., NAME being one of the file's models."
        )
    _set(comparison, given)
    run(build_comparison(comparison))
    return None


def with_defaults(options: argparse.Namespace) -> argparse.Namespace:
    """The options with their defaults, for what is not a comparison."""
    given = {name: value for name, value in vars(options).items() if value is not NOT_GIVEN}
    return argparse.Namespace(**options.defaults | given)


def _from_model(given: dict[str, Any]) -> dict[str, Any]:
    """A comparison of the one model that the options name."""
    if "output" not in given:
        raise ValueError("Name a comparison's YAML file, or a folder for the results of the other options: --output.")
    name = base_name(given.get("model"), given.get("adapter"))
    model = {key: given[option] for option, key in MODEL_OPTIONS.items() if option in given}
    return {"models": {display_name(name, given.get("gguf_file")): model}}


def _set(comparison: dict[str, Any], given: dict[str, Any]) -> None:
    """Puts options into their places."""
    for option, (section, key) in OPTIONS.items():
        if option in given:
            value = [given[option]] if option == "seed" else given[option]
            comparison[section] = (comparison.get(section) or {}) | {key: str(value) if option == "output" else value}
    if "tasks" in given:
        comparison["tasks"] = {name: {} for name in given["tasks"]}
    if "examples" in given:
        tasks = comparison.get("tasks") or {}
        comparison["tasks"] = {name: (entry or {}) | {"examples": given["examples"]} for name, entry in tasks.items()}
