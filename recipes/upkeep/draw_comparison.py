"""Draws the pictures of committed comparisons again, from the means in compare.jsonl.

    python recipes/upkeep/draw_comparison.py SmolLM2-135M recipes/bench/results/compare_smollm2.png
    python recipes/upkeep/draw_comparison.py Gemma-3-270M recipes/bench/results/compare_gemma3.png

Of means that stand there several times, the last ones count.
"""

import argparse
import json
import re
import sys
from pathlib import Path
from typing import Any

from retention_gates.gates.policies import POLICIES
from retention_gates.recipes.loading.output_folder import replacing
from retention_gates.recipes.report import plots
from retention_gates.recipes.report.contents import FULL_CACHE, METRICS, contender_name, metric_of
from retention_gates.trainers.evaluation.paired_statistics import Score, Summary

RESULTS = Path(__file__).resolve().parents[1] / "bench" / "results" / "compare.jsonl"
CASE = re.compile(r"(?P<model>.+) (?P<task>\S+) T=(?P<length>\d+) M=(?P<size>\d+) rows=(?P<rows>\d+)")
BUDGETS = ("uniform", "calibrated", "pyramid", "adaptive")


def summaries(records: list[dict[str, Any]], model: str) -> list[Summary]:
    """One for each contender and memory size, and the full cache of each task.

    Raises:
        ValueError: if there are none of the model, or a contender is unknown.
    """
    kinds = {contender_name(policy, budgets): (policy, budgets) for policy in POLICIES for budgets in BUDGETS}
    found: dict[tuple[str, int, str, int | None], Summary] = {}
    for record in records:
        case = CASE.fullmatch(record["case"])
        if case is None or case["model"] != model:
            continue
        task, length, rows, metric = case["task"], int(case["length"]), int(case["rows"]), metric_of(case["task"])
        if record["unit"] != METRICS[metric][0]:
            continue
        if record["contender"] not in kinds:
            raise ValueError(f"{record['contender']!r} in {record['case']!r} is no contender's name of this version.")
        policy, budgets = kinds[record["contender"]]
        full = Summary(task, length, FULL_CACHE, None, None, rows, {metric: Score(record["limit"], None, None)})
        found[task, length, FULL_CACHE, None] = full
        scores = {metric: Score(record["value"], record["spread"], None)}
        size = int(case["size"])
        found[task, length, record["contender"], size] = Summary(task, length, policy, size, budgets, rows, scores)
    if not found:
        models = sorted({match["model"] for record in records if (match := CASE.fullmatch(record["case"]))})
        raise ValueError(f"{model!r} has no scores: choose among {', '.join(models)}.")
    return list(found.values())


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="as the cases in compare.jsonl name it")
    parser.add_argument("picture", type=Path, help="PNG file that is written")
    options = parser.parse_args(arguments)
    records = [json.loads(line) for line in RESULTS.read_text(encoding="utf-8").splitlines()]
    with replacing(options.picture) as temporary:
        plots.score_against_memory(summaries(records, options.model), temporary)
    return 0


if __name__ == "__main__":
    sys.exit(main())
