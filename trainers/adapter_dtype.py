"""Storage of an adapter's numbers: gates work in fp32, and 16 bits are enough to keep them."""

import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from retention_gates.gates.adapter.checks import file_digest
from retention_gates.gates.adapter.files import CONFIG_NAME, WEIGHTS_NAME

DTYPES = ("float32", "float16", "bfloat16")


def store_as(folder: Path, dtype: str) -> None:
    """Rewrites the weights of an adapter's folder in another dtype, and their digest in its config.

    Raises:
        ValueError: for a dtype that is none of DTYPES, and for weights beyond its range.
    """
    if dtype not in DTYPES:
        raise ValueError(f"Gates are stored as {', '.join(DTYPES)}, not {dtype!r}.")
    tensors = {key: tensor.to(getattr(torch, dtype)) for key, tensor in load_file(folder / WEIGHTS_NAME).items()}
    beyond = [key for key, tensor in tensors.items() if not tensor.isfinite().all()]
    if beyond:
        raise ValueError(f"{beyond[0]} has values beyond the range of {dtype}: store the gates as float32.")
    save_file(tensors, folder / WEIGHTS_NAME, metadata={"format": "pt"})
    config = json.loads((folder / CONFIG_NAME).read_text(encoding="utf-8"))
    config["weights_sha256"] = file_digest(folder / WEIGHTS_NAME, config)
    (folder / CONFIG_NAME).write_text(json.dumps(config, indent=2, sort_keys=True), encoding="utf-8")
