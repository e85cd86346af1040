"""LongProc's records as its repository has them, turned into those of the Hub, with whole prompts.

Three kinds are read: path traversal, theory of mind and countdown. The others need files beside (HTML pages, programs,
examples of trips). Countdown's two worked examples are made by a program in the repository; here they are the last two
records of the file, which are then not asked.
"""

import json
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import yaml

from retention_gates.data.suites.base import Record

EXAMPLES = 2
FIELD = re.compile(r"\{\{|\}\}|\{(\w+)\}")


def convert(records: Iterable[Record], folder: Path, subset: str) -> Iterator[Record]:
    """Records of the Hub's form as they are, those of the repository's with the prompt from the file beside.

    Raises:
        ValueError: without that file, or with one that is no template.
    """
    own = list(records)
    if not own or "input_prompt" in own[0].columns:
        yield from own
        return
    kind = subset.rpartition("_")[0]
    if kind not in READERS:
        raise ValueError(
            f"longproc: {own[0].name} has no field 'input_prompt', and the repository's form is read of "
            f"{', '.join(READERS)} only: give records in the Hub's form for {kind}."
        )
    template, demonstration = _template(folder, kind), ""
    if kind == "countdown":
        if len(own) <= EXAMPLES:
            raise ValueError(
                f"longproc: {EXAMPLES} of a file's records are worked examples, and there are {len(own)}: give the "
                "whole file, and a limit if it is long."
            )
        demonstration = "\n\n".join(_worked(record) for record in own[-EXAMPLES:])
        own = own[:-EXAMPLES]
    for record in own:
        fields, reference, details = READERS[kind](record)
        prompt = _filled(template, fields | {"demonstration": demonstration}, folder)
        columns = {"input_prompt": prompt, "reference_output": reference, "metadata": json.dumps(details)}
        yield Record(record.suite, record.name, columns)


def _template(folder: Path, kind: str) -> str:
    names = (f"{kind}.prompts.yaml", "prompts.yaml")
    place = next((folder / name for name in names if (folder / name).is_file()), None)
    if place is None:
        raise ValueError(
            f"longproc: records in the repository's form need the wording of their prompts, {' or '.join(names)} in "
            f"{folder}: copy it from the repository, or give records in the Hub's form."
        )
    try:
        found = yaml.safe_load(place.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"longproc: {place} is not YAML: {error}") from error
    if not isinstance(found, dict) or not isinstance(found.get("USER_PROMPT"), str):
        raise ValueError(f"longproc: {place} must have a text USER_PROMPT, as the repository's files have.")
    return found["USER_PROMPT"]


def _filled(template: str, fields: dict[str, Any], folder: Path) -> str:
    """The template with its {names} replaced; a brace stands for itself where it is doubled."""

    def text(found: re.Match[str]) -> str:
        if found[1] is None:
            return found[0][0]
        if found[1] not in fields:
            raise ValueError(
                f"longproc: the prompt in {folder} asks for {found[1]!r}; known are {', '.join(sorted(fields))}. Is "
                "it that of another kind?"
            )
        return str(fields[found[1]])

    return FIELD.sub(text, template)


def _path_traversal(record: Record) -> tuple[dict[str, Any], str, dict[str, Any]]:
    cities = record.texts("question_repr")
    if len(cities) != 2:
        raise ValueError(f"longproc: field 'question_repr' of {record.name} must be two cities, not {cities!r}.")
    fields = {"city_context": record.text("context_nl"), "src_city": cities[0], "dst_city": cities[1]}
    return fields, record.text("answer_nl"), {}


def _tom_tracking(record: Record) -> tuple[dict[str, Any], str, dict[str, Any]]:
    return {name: record.text(name) for name in ("story", "question")}, record.text("solution"), {}


def _countdown(record: Record) -> tuple[dict[str, Any], str, dict[str, Any]]:
    fields = {"nums": record.get("nums", list), "target": record.get("target", int)}
    return fields, record.text("solution_text"), fields


def _worked(record: Record) -> str:
    numbers, target = record.get("nums", list), record.get("target", int)
    return f"# Example\nNumbers: {numbers}\nTarget: {target}\n\n{record.text('demonstration').strip()}"


READERS = {"path_traversal": _path_traversal, "tom_tracking": _tom_tracking, "countdown": _countdown}
