"""Writes the tables of README.md, results.md and speed.md from the records in recipes/bench/results.

    python docs/result_tables.py    fills in what stands between `<!-- table NAME -->` and `<!-- end -->`

Each table holds the records of one machine and one commit. A test compares the pages with the records.
"""

import json
import re
from collections.abc import Callable, Iterable
from itertools import takewhile
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).resolve().parent
RESULTS = FOLDER.parent / "recipes" / "bench" / "results"
PAGES = ("../README.md", "results.md", "speed.md")
MARKED = re.compile(r"(<!-- table (\S+) -->\n).*?(<!-- end -->)", re.DOTALL)
SIZES = (32, 64, 128, 256)
TASKS = {
    "passkey": "passkey",
    "code_lookup": "codes",
    "sentence_recall": "sentences",
    "passage_repeat": "passages",
}
GATES = ("gates, calibrated", "gates, uniform")
Record = dict[str, Any]


def read(bench: str) -> list[Record]:
    with open(RESULTS / f"{bench}.jsonl", encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def speed(bench: str, commit: str, gpu: str | None, *cases: str, skip: str = "the graph alone") -> str:
    """Returns a table of the cases that begin like one of `cases`: measured, possible, and the share reached.

    Raises:
        ValueError: if there is no such record, or they were not made in one environment.
    """
    rows = [
        record
        for record in read(bench)
        if (record["commit"], record["gpu"]) == (commit, gpu)
        and record["case"].startswith(cases or "")
        and not record["contender"].endswith(skip)
    ]
    if not rows:
        raise ValueError(f"{bench}.jsonl has no record of {commit} on {gpu} with a case that begins like {cases}.")
    versions = {(record["torch"], record["triton"]) for record in rows}
    if len(versions) != 1:
        raise ValueError(f"{bench}.jsonl at {commit} mixes versions: {sorted(versions)}. Choose other cases.")
    ((torch, triton),) = versions
    several, bounded = len({record["case"] for record in rows}) > 1, any(record["limit"] for record in rows)
    shared = shared_beginning([record["case"] for record in rows])
    names = [*(["case"] if several else []), "", "measured", *(["limit", "share of it"] if bounded else [])]
    lines = [f"| {' | '.join(names)} |", f"|{'---|' * (len(names) - 2 * bounded - 1)}{'---:|' * (2 * bounded + 1)}"]
    for record in rows:
        case = record["case"].removeprefix(shared)
        cells = [case] * several + [record["contender"], quantity(record["value"], record["unit"])]
        if bounded:
            cells += limits(record)
        lines.append(f"| {' | '.join(cells)} |")
    where = gpu.removeprefix("NVIDIA ") if gpu else "Two CPU cores"
    of_all = f"{shared.rstrip(' :')}. " if shared.strip() else ""
    software = f"torch {torch}" + (f", Triton {triton}" if gpu else "")
    return "\n".join([*lines, "", f"{of_all}{where}, {software}, commit {commit}; `{bench}.jsonl`."]) + "\n"


def shared_beginning(cases: list[str]) -> str:
    """Returns the words that all cases begin with, if they say a size or a model."""
    words = takewhile(lambda same: len(set(same)) == 1, zip(*(f"{case} ".split(" ") for case in cases), strict=False))
    shared = "".join(f"{same[0]} " for same in words)
    return shared if any(character.isdigit() for character in shared) else ""


def quantity(value: float, unit: str) -> str:
    digits = 0 if abs(value) >= 100 or value == int(value) else 1 if abs(value) >= 10 else 2
    return f"{value:,.{digits}f} {unit}"


def limits(record: Record) -> list[str]:
    if not record["limit"]:
        return ["", ""]
    share = record["value"] / record["limit"]
    if "/s" not in record["unit"]:  # a time, which is best when it is short
        share = 1 / share
    return [quantity(record["limit"], record["unit"]), f"{share:.2f}" if share >= 0.01 else "under 0.01"]


def comparison(model: str, commit: str, task: str, length: int) -> dict[str, dict[int, Record]]:
    """Returns the records of a model and a task: contender -> memory size -> record."""
    found: dict[str, dict[int, Record]] = {}
    for record in read("compare"):
        match = re.fullmatch(rf"{re.escape(model)} {task} T={length} M=(\d+) rows=\d+", record["case"])
        if match and record["commit"] == commit:
            found.setdefault(record["contender"], {})[int(match[1])] = record
    return found


def quality(model: str, commit: str) -> str:
    """Returns the table of KL to the full cache, the best in 64 entries first."""
    found = comparison(model, commit, "text", 2048)
    order = sorted(found, key=lambda name: found[name][64]["value"])
    lines = [f"| | {' | '.join(map(str, SIZES))} |", f"|---|{'---:|' * len(SIZES)}"]
    for name in order:
        best = [found[name][size]["value"] == min(each[size]["value"] for each in found.values()) for size in SIZES]
        cells = [number(found[name][size]["value"], bold) for size, bold in zip(SIZES, best, strict=True)]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    (gpu,) = {record["gpu"] for sizes in found.values() for record in sizes.values()}
    return "\n".join([*lines, "", f"{model}. {gpu.removeprefix('NVIDIA ')}, commit {commit}."]) + "\n"


def recall(model: str, commit: str) -> str:
    """Returns the table of answer tokens that are right in 64 entries: gates, the best rival, the full cache."""
    lines = [
        "| | gates, calibrated | gates, uniform | best rival | StreamingLLM | full cache |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    gpus: set[str] = set()
    for task, name in TASKS.items():
        for length in (512, 1024):
            found = comparison(model, commit, task, length)
            if not found:
                continue
            here = {contender: sizes[64] for contender, sizes in found.items()}
            best = max((each for each in here if each not in GATES), key=lambda each: here[each]["value"])
            cells = [number(here[each]["value"]) for each in GATES]
            cells += [f"{best} {number(here[best]['value'])}", number(here["StreamingLLM"]["value"])]
            lines.append(f"| {name}, {length} tokens | {' | '.join(cells)} | {number(here[best]['limit'])} |")
            gpus |= {record["gpu"] for record in here.values()}
    (gpu,) = gpus
    where = f"{gpu.removeprefix('NVIDIA ')}, commit {commit}"
    return "\n".join([*lines, "", f"{model}, 64 entries per head. {where}."]) + "\n"


def summary() -> str:
    """Returns README's table: text, passkeys and codes of SmolLM2 in 64 entries, without the provenance."""
    found = [comparison("SmolLM2-135M", "c5ee284", "text", 2048)]
    found += [comparison("SmolLM2-135M", "33f5b1d", task, 1024) for task in ("passkey", "code_lookup")]
    columns = [{name: sizes[64] for name, sizes in contenders.items()} for contenders in found]
    gates, rivals, streaming, full = [], [], [], []
    for best_of, here in zip((min, max, max), columns, strict=True):
        rival = best_of((name for name in here if name not in GATES), key=lambda name: here[name]["value"])
        gates.append(f"**{here[GATES[0]]['value']:.2f}**")
        rivals.append(f"{here[rival]['value']:.2f} ({rival})")
        streaming.append(f"{here['StreamingLLM']['value']:.2f}")
        full.append(f"{here[rival]['limit']:.2f}")
    rows = {"**gates**": gates, "best untrained policy": rivals, "StreamingLLM": streaming, "full cache": full}
    lines = [f"| {name} | {' | '.join(cells)} |" for name, cells in rows.items()]
    return "\n".join(["| | KL | passkeys | codes |", "|---|---:|---:|---:|", *lines]) + "\n"


def number(value: float, bold: bool = False) -> str:
    text = f"{value:.3f}" if abs(value) < 1 else f"{value:.2f}"
    text = text.removeprefix("0") if value else "0"
    return f"**{text}**" if bold else text


H100, H200 = "NVIDIA H100 80GB HBM3", "NVIDIA H200"
TABLES: dict[str, Callable[[], str]] = {
    "summary": summary,
    "quality-smollm2": lambda: quality("SmolLM2-135M", "c5ee284"),
    "quality-gemma": lambda: quality("Gemma-3-270M", "c5ee284"),
    "facts-smollm2": lambda: recall("SmolLM2-135M", "33f5b1d"),
    "passages-smollm2": lambda: recall("SmolLM2-135M", "c5ee284"),
    "recall-gemma": lambda: recall("Gemma-3-270M", "c5ee284"),
    "decode": lambda: speed("decode", "6ac5d5c", H200, "qwen3-4b B=4 M"),
    "decode-batches": lambda: speed("decode", "6ac5d5c", H200, "qwen3-4b B=1 M", "qwen3-4b B=32 M"),
    "decode-cpu": lambda: speed("decode", "f7f2f9d", None),
    "prefill": lambda: speed("prefill", "f238c8a", H100),
    "train-step": lambda: speed("train_step", "847b935", H100),
    "train-long": lambda: speed("train", "a5d7446", H100),
    "train-ranks": lambda: speed("train_ranks", "33f5b1d", H200),
    "retention-attention": lambda: speed("retention_attention", "847b935", H100, "T=16384 HQ"),
    "retention-sum": lambda: speed("retention_sum", "e0b2a1b", H100, "T=16384 rows", "T=131072 rows"),
    "distill-loss": lambda: speed("distill_loss", "e0b2a1b", H100),
    "decode-attention": lambda: speed("slot_attention", "f238c8a", H100),
    "serving": lambda: speed("serving", "0d86928", None),
}


def filled(text: str) -> str:
    """Returns a page's text with every marked table as the records have it."""

    def fill(match: re.Match[str]) -> str:
        if match[2] not in TABLES:
            raise ValueError(f"There is no table {match[2]!r}: choose among {', '.join(TABLES)}.")
        return f"{match[1]}{TABLES[match[2]]()}{match[3]}"

    return MARKED.sub(fill, text)


def names(text: str) -> Iterable[str]:
    return (match[2] for match in MARKED.finditer(text))


if __name__ == "__main__":
    for page in PAGES:
        path = FOLDER / page
        path.write_text(filled(path.read_text(encoding="utf-8")), encoding="utf-8")
