"""A training run told in Markdown, from what it has logged."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from retention_gates.data.reading import Reading
from retention_gates.trainers.callbacks import LOG_NAME
from retention_gates.trainers.checkpoint import checkpoints_in
from retention_gates.trainers.phases import MEMORY, TIME

SUMMARY = "summary.md"
MOST_ROWS = 12  # of a table
LOSSES = ("loss", "forward_kl", "next_token_loss", "layer_error", "capacity_loss", "retained_mass")


def summarise(
    output_dir: Path, given: dict[str, Any], base_model: str, readings: Sequence[Reading], ranks: int
) -> str:
    """Args: given: what the run's file says, by section. readings: what was read of each source."""
    lines = [json.loads(line) for line in (output_dir / LOG_NAME).read_text(encoding="utf-8").splitlines()]
    steps = [line for line in lines if "loss" in line]
    evaluations = [line for line in lines if any(key.startswith("eval_kl_") for key in line)]
    last = steps[-1] if steps else {}
    parts = [f"# {output_dir.name}", _facts(last, given, base_model, ranks, checkpoints_in(output_dir)), "## Data"]
    parts.append("\n".join(f"- {reading}" for reading in readings))
    if steps:
        names = [name for name in LOSSES if name in last]
        parts += ["## Losses", _table(["step", *names], [[x["step"], *map(x.get, names)] for x in _spread(steps)])]
    if evaluations:
        sizes = [key.removeprefix("eval_kl_") for key in evaluations[-1] if key.startswith("eval_kl_")]
        header = ["step", *(f"KL at {size}" for size in sizes), *(f"agreement at {size}" for size in sizes)]
        keys = [f"eval_{name}_{size}" for name in ("kl", "agreement") for size in sizes]
        rows = [[line["step"], *map(line.get, keys)] for line in _spread(evaluations)]
        parts += [
            "## Under real eviction",
            "Entries per KV head in the mean; KL in nats per token.",
            _table(header, rows),
        ]
    shares = {key.removeprefix(TIME): value for key, value in last.items() if key.startswith(TIME)}
    if shares:
        ordered = sorted(shares.items(), key=lambda item: -item[1])
        parts += ["## Time", _table(["phase", "share"], [[name, f"{share:.1%}"] for name, share in ordered])]
    return "\n\n".join(parts) + "\n"


def _facts(last: dict[str, Any], given: dict[str, Any], base_model: str, ranks: int, checkpoints: list[Path]) -> str:
    facts = {
        "base model": base_model,
        "objective": given.get("training", {}).get("objective", "end_to_end"),
        "steps": last.get("step"),
        "ranks": ranks,
        "tokens per second": None if "tokens_per_second" not in last else f"{last['tokens_per_second']:,.0f}",
        "last checkpoint": checkpoints[-1].name if checkpoints else None,
    }
    facts |= {
        f"most memory ({key.removeprefix(MEMORY).removesuffix('_peak_gib')})": f"{value:.1f} GiB"
        for key, value in last.items()
        if key.startswith(MEMORY)
    }
    return "\n".join(f"- {name}: {value}" for name, value in facts.items() if value is not None)


def _spread(lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """At most MOST_ROWS of the lines, the first and the last among them."""
    if len(lines) <= MOST_ROWS:
        return lines
    return [lines[round(i * (len(lines) - 1) / (MOST_ROWS - 1))] for i in range(MOST_ROWS)]


def _table(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    cells = [[f"{cell:.4g}" if isinstance(cell, float) else str(cell) for cell in row] for row in rows]
    return "\n".join("| " + " | ".join(row) + " |" for row in [list(header), ["---:"] * len(header), *cells])
