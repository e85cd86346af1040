"""Hashes of what a result depends on: weights, gates, tokens, and the code that computes with them."""

import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import nn

from retention_gates.gates.adapter.families import text_config
from retention_gates.gates.adapter.model import find_gated_model

ROOT = Path(__file__).resolve().parents[2]
SCORING = ("answer_batches", "answer_rows", "answers", "contenders", "forward_passes", "text")
# what decides a score, beside the libraries
CODE = (
    "gates",
    "kernels",
    "trainers/output_head.py",
    "trainers/distributed/sharding.py",
    *(f"trainers/evaluation/{name}.py" for name in SCORING),
)
# what a config says of its origin rather than of the numbers that the model computes
ORIGIN = (
    *("_name_or_path", "base_model_name_or_path", "base_rounding", "gguf_source", "revision"),
    *("transformers_version", "inference_mode"),
)


@dataclass(frozen=True)
class ModelDigests:
    """Of the base model, and of the gates with their budget shares."""

    base: str
    gates: str


def digest(parts: Iterable[bytes]) -> str:
    """The first 16 hexadecimal digits of a SHA-256 over the parts and their lengths."""
    sha = hashlib.sha256()
    for part in parts:
        sha.update(f"{len(part)}:".encode())
        sha.update(part)
    return sha.hexdigest()[:16]


def of_value(value: Any) -> str:
    """Of anything that JSON can say."""
    return digest([json.dumps(value, sort_keys=True, default=str).encode()])


def of_model(model: "nn.Module") -> ModelDigests:
    """Of the numbers in memory, wherever they came from: a copied folder is the same model, other weights are not."""
    gated = find_gated_model(model)
    named = [*gated.named_parameters(), *gated.named_buffers()]
    base = [(name, tensor) for name, tensor in named if gated.prefix not in name]
    gates = [(name, tensor) for name, tensor in named if gated.prefix in name]
    configs = [text_config(gated.model).to_dict(), gated.active_config.to_dict()]
    said = [of_value({k: v for k, v in config.items() if k not in ORIGIN}).encode() for config in configs]
    return ModelDigests(digest(chain(said[:1], _bytes(base))), digest(chain(said[1:], _bytes(gates))))


def of_code() -> str:
    """Of the package's own source files that scores depend on."""
    files: list[Path] = []
    for name in CODE:
        place = ROOT / name
        files += [place] if place.is_file() else sorted(place.rglob("*.py"))
    return digest(part for file in files for part in (str(file.relative_to(ROOT)).encode(), file.read_bytes()))


def _bytes(named: "Iterable[tuple[str, torch.Tensor]]") -> Iterable[bytes]:
    for name, tensor in named:
        yield f"{name} {tensor.dtype} {list(tensor.shape)}".encode()
        yield tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
