"""Learned memory for LLMs: a KV cache of fixed size for any pretrained Hugging Face decoder.

Importing this package makes PEFT know retention gates.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from retention_gates.compat import check_versions
from retention_gates.process import is_command, stop
from retention_gates.registration import register

if TYPE_CHECKING:
    from retention_gates.gates.adapter.base_identity import BaseMismatchWarning
    from retention_gates.gates.adapter.config import RetentionGateConfig
    from retention_gates.gates.adapter.gate_outputs import record
    from retention_gates.gates.adapter.model import RetentionGateModel, find_gated_model
    from retention_gates.gates.cache.bounded_cache import BoundedCache
    from retention_gates.trainers.config import RetentionTrainingArguments
    from retention_gates.trainers.trainer import RetentionTrainer

__version__ = "0.1.0"

# public name -> the module that has it, which is imported when the name is first asked for
_MODULES = {
    "BaseMismatchWarning": "gates.adapter.base_identity",
    "BoundedCache": "gates.cache.bounded_cache",
    "RetentionGateConfig": "gates.adapter.config",
    "RetentionGateModel": "gates.adapter.model",
    "RetentionTrainer": "trainers.trainer",
    "RetentionTrainingArguments": "trainers.config",
    "find_gated_model": "gates.adapter.model",
    "record": "gates.adapter.gate_outputs",
}

__all__ = [
    "BaseMismatchWarning",
    "BoundedCache",
    "RetentionGateConfig",
    "RetentionGateModel",
    "RetentionTrainer",
    "RetentionTrainingArguments",
    "find_gated_model",
    "record",
]


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


try:
    check_versions()
except (ImportError, ValueError) as error:
    if not is_command():
        raise
    stop(error)
register()
