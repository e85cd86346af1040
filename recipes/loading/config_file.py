"""YAML files with sections, and overrides on the command line: read, checked, and turned into dataclasses."""

import difflib
import re
import types
from collections.abc import Iterable, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, Union, get_args, get_origin, get_type_hints

import yaml

DEEPEST = 50


def read(path: str | Path, sections: Iterable[str]) -> dict[str, Any]:
    """The file's mapping; `sections` are named if it is none."""
    try:
        content = parse(Path(path).read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise ValueError(f"The run's file {path} cannot be read: {error.strerror}.") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is no YAML: {error}") from error
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} must hold sections ({', '.join(sections)}), not {type(content).__name__}.")
    return content


class UniqueKeyLoader(yaml.SafeLoader):
    """As YAML's own, but a key that stands twice in a mapping is an error and does not replace the first."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        lines: dict[str, int] = {}
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode) or key.tag == "tag:yaml.org,2002:merge":
                continue
            line = key.start_mark.line + 1
            if key.value in lines:
                raise ValueError(
                    f"the key {key.value!r} stands in line {lines[key.value]} and again in line {line}: keep one."
                )
            lines[key.value] = line
        return super().construct_mapping(node, deep)


def parse(text: str) -> Any:
    """Returns what a YAML text holds, a key at most once in each mapping.

    Raises:
        ValueError: for a key that stands twice, and for more than DEEPEST levels of brackets.
        yaml.YAMLError: for text that is no YAML.
    """
    depth = 0
    for bracket in re.findall(r"[\[\]{}]", text):
        depth += 1 if bracket in "[{" else -1
        if depth > DEEPEST:
            raise ValueError(f"it has more than {DEEPEST} levels of brackets, where a run's file has a few.")
    return yaml.load(text, UniqueKeyLoader)  # which is a SafeLoader


def override(given: dict[str, Any], path: Sequence[str], text: str) -> None:
    """Sets the value under nested keys to what `text` says in YAML.

    Raises:
        ValueError: for text that is no YAML, and where a key on the way holds no mapping.
    """
    try:
        value = parse(text)
    except yaml.YAMLError as error:
        raise ValueError(f"The value of '{'.'.join(path)}={text}' is no YAML: {error}") from error
    for depth, key in enumerate(path[:-1], start=1):
        if given.get(key) is None:
            given[key] = {}
        check_mapping(".".join(path[:depth]), given[key])
        given = given[key]
    given[path[-1]] = value


def build(cls: type, given: dict[str, Any], where: str, *, what: str, allowed: Sequence[str] | None = None) -> Any:
    """A dataclass from a section's values, each of the kind that its field has.

    Args:
        where: the section's name; what: the kind of file, for messages such as "is no option of a training run".
        allowed: the fields that may be given. None: all.
    """
    allowed = [f.name for f in fields(cls) if f.init] if allowed is None else allowed
    hints = get_type_hints(cls)
    values = {}
    for name, value in given.items():
        if name not in allowed:
            raise ValueError(unknown(name, allowed, f"{where}.", what))
        values[name] = _coerce(f"{where}.{name}", value, hints[name])
    try:
        return cls(**values)
    except TypeError as error:
        raise ValueError(f"The section {where!r} is not complete: {error}.") from error


def unknown(name: Any, allowed: Iterable[str], prefix: str, what: str) -> str:
    near = difflib.get_close_matches(str(name), list(allowed), n=1, cutoff=0)
    return f"{prefix}{name} is no option of {what}; the nearest is {prefix}{near[0]}."


def check_mapping(name: str, value: object) -> None:
    if not isinstance(value, dict):
        raise ValueError(f"The section {name!r} must be a mapping of keys to values, not {value!r}.")


def check_count(name: str, value: object, least: int, most: int | None = None) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < least or (most is not None and value > most):
        limit = f"{least} or more" if most is None else f"from {least} to {most}"
        raise ValueError(f"{name}={value!r} must be a whole number, {limit}.")


def _coerce(name: str, value: Any, hint: Any) -> Any:
    """The value, a float where YAML reads `1e-3` as text; refuses a value of a plain kind that isn't asked for."""
    kinds = get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)
    plain = [get_origin(kind) or kind for kind in kinds]
    if value is False and str in plain and bool not in plain:
        return "no"  # which YAML reads as False: eval_strategy: no
    if any(kind not in (int, float, str, bool, list, dict, type(None)) for kind in plain):
        return value  # an enumeration: transformers checks it and names the choices
    if isinstance(value, str) and float in plain and str not in plain:
        try:
            return float(value)
        except ValueError:
            pass
    matches = (type(value) in plain) or (type(value) is int and float in plain)
    if not matches:
        wanted = " or ".join(kind.__name__ for kind in plain if kind is not type(None))
        raise ValueError(f"{name}={value!r} is a {type(value).__name__}, where {wanted} is wanted.")
    if type(value) is int and int not in plain:
        try:
            return float(value)
        except OverflowError as error:
            raise ValueError(f"{name} is a number of {len(str(value))} digits, too large for a float.") from error
    return value
