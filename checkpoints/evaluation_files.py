"""The files that `evaluate` leaves in its folder, and what they say of one adapter, in words for others to read."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

RESULTS, REPORT = "results.jsonl", "report.md"


def report_of(folder: Path, adapter: Path, repository: str) -> str:
    """The report without its title, as far as it is of this adapter, which may be named by folder or repository.

    Raises:
        ValueError: for a folder of something else, and an evaluation of other adapters only.
    """
    header, models = _read(folder)
    mine = [model for model in models if _names(model["adapter"], adapter, repository)]
    if not mine:
        named = ", ".join(model["adapter"] for model in models if model["adapter"])
        raise ValueError(
            f"{folder} evaluates {named or 'no adapter'}, not {adapter}: run retention-gates evaluate --adapter "
            f"{adapter}, and name its output."
        )
    lines = (folder / REPORT).read_text(encoding="utf-8").splitlines()[1:]
    if len(models) > 1:
        lines = list(_of_models(lines, models, {model["title"] for model in mine}))
    text = "\n".join(lines).strip()
    values = {str(value) for model in mine for value in (model["adapter"], model["model"], header.get("text"))}
    for value in sorted(values, key=len, reverse=True):  # one folder may lie in another
        text = text.replace(value, without_folders(value))
    return text


def without_folders(value: str) -> str:
    """The last part of a path that only this machine has; anything else as it is."""
    return Path(value).name if Path(value).is_absolute() or value.startswith((".", "~")) else value


def _read(folder: Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The header of results.jsonl and the models that it has records of.

    Written answers are of one model, which the header describes; a comparison has a line for each model.
    """
    for name in (RESULTS, REPORT):
        if not (folder / name).is_file():
            raise ValueError(f"{folder} has no {name}: name a folder that retention-gates evaluate has written.")
    with (folder / RESULTS).open(encoding="utf-8") as file:
        try:
            header = json.loads(file.readline())
            if header["kind"] == "header" and "model" in header:
                return header, [header]
            return header, [line for line in map(json.loads, file) if line["kind"] == "model"]
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            raise ValueError(
                f"{folder / RESULTS} is not as this version of retention-gates evaluate writes it ({error!r}): run "
                "the evaluation again."
            ) from error


def _names(value: str | None, adapter: Path, repository: str) -> bool:
    return value is not None and (value.partition("@")[0] == repository or Path(value).resolve() == adapter.resolve())


def _of_models(lines: Iterable[str], models: list[dict[str, Any]], titles: set[str]) -> Iterable[str]:
    """Leaves out the findings, facts and sections of other models."""
    by_length = sorted((model["title"] for model in models), key=len, reverse=True)  # "small" begins "small: new" too
    wanted, blank = True, False
    for line in lines:
        starts = ((title, (f"**{title}.** ", f"- {title}: ", f"## {title}: ")) for title in by_length)
        owner = next((title for title, prefixes in starts if line.startswith(prefixes)), None)
        if line.startswith("## "):
            wanted = owner is None or owner in titles
        if wanted and (owner is None or owner in titles) and not (blank and not line):
            yield line
            blank = not line
