"""Learned memory for LLMs: a KV cache of fixed size for any pretrained Hugging Face decoder."""

from retention_gates.gates.config import RetentionGateConfig
from retention_gates.gates.model import RetentionGateModel, find_gated_model
from retention_gates.gates.recording import record

__version__ = "0.1.0"

__all__ = ["RetentionGateConfig", "RetentionGateModel", "find_gated_model", "record"]
