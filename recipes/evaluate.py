"""Compares policies and memory sizes with the full cache, on text and on recall tasks.

    retention-gates evaluate recipes/runs/compare_smollm2.yaml text.rows=4
    retention-gates evaluate --adapter out/adapter --memory-size 64 128 --output out/evaluation

The first takes everything from a YAML file, several models if it names them; the second has one model and options for
the rest, which may also follow a file. Both write to the output folder: report.html, report.md, score.png,
summary.jsonl (every mean), results.jsonl (a header, then one object per row and contender), and scores.jsonl, from
which a run that was stopped goes on and a later one takes what it has in common.
"""

import argparse
from typing import Any

from retention_gates.gates.adapter.base_identity import display_name
from retention_gates.recipes.arguments.evaluate import MODEL_OPTIONS, NOT_GIVEN, OPTIONS
from retention_gates.recipes.comparison import written_answers
from retention_gates.recipes.comparison.comparison_config import build_comparison, read_comparison
from retention_gates.recipes.comparison.run import run
from retention_gates.recipes.loading.models import base_name


def main(options: argparse.Namespace) -> None:
    if written_answers.wanted(options):
        if options.config is not None:
            raise ValueError(f"--suites and --lm-eval go without a file: leave {options.config} out.")
        return written_answers.main(with_defaults(options))

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
