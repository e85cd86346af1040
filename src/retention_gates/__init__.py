"""Learned memory for LLMs: a KV cache of fixed size for any pretrained Hugging Face decoder.

Importing this package makes PEFT know retention gates.
"""

from typing import TYPE_CHECKING, Any

from retention_gates.compat import check_versions

check_versions()  # before an import fails on what another version of transformers or PEFT lacks

from retention_gates.gates.adapter.base_identity import BaseMismatchWarning
from retention_gates.gates.adapter.config import RetentionGateConfig
from retention_gates.gates.adapter.gate_outputs import record
from retention_gates.gates.adapter.model import RetentionGateModel, find_gated_model
from retention_gates.gates.cache.bounded_cache import BoundedCache

if TYPE_CHECKING:
    from retention_gates.trainers.config import RetentionTrainingArguments
    from retention_gates.trainers.trainer import RetentionTrainer

__version__ = "0.1.0"

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


def __getattr__(name: str) -> Any:  # whoever only generates need not wait for the trainer's imports
    if name == "RetentionTrainer":
        from retention_gates.trainers.trainer import RetentionTrainer

        return RetentionTrainer
    if name == "RetentionTrainingArguments":
        from retention_gates.trainers.config import RetentionTrainingArguments

        return RetentionTrainingArguments
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
