"""Is this the base model that the adapter was trained on? Shapes must agree; names, revisions and roundings should."""

import hashlib
import json
import os
import re
import warnings
from pathlib import Path
from typing import Any

import torch

from retention_gates.compat import noted_commit

SAMPLED = 1024  # numbers of each weight that the fingerprint looks at
# What stands behind a model's name in that of a GGUF file: how it is quantised (".Q4_1", "-UD-Q4_K_XL", "-f16"), and
# which part of several it is.
QUANTISATION = re.compile(r"([.-](UD-)?(I?Q|TQ|B?F|FP|MXFP)\d\w*)?(-\d{5}-of-\d{5})?$", re.IGNORECASE)
WHOLE = "none"  # a rounding: weights of 16 or 32 bits
WHOLE_TYPES = ("F32", "F16", "BF16")  # of GGUF files
UNNAMED = ("", "model", "ggml-model", "weights")  # file names that say nothing of the model


class BaseMismatchWarning(UserWarning, ValueError):
    """The base model fits the adapter but is called otherwise, or is another revision or rounding of what it knows.

    `warnings.simplefilter("error", BaseMismatchWarning)` makes it an error, which is a ValueError then.
    """


def warn_if_another_base(config: Any, model: Any) -> None:
    """Warns if the base model's name or revision is not the one in the adapter's config, where both are known."""
    name, revision = identity(model)
    recorded, recorded_revision = _split_snapshot(config.base_model_name_or_path or "")
    recorded_revision = config.revision or recorded_revision
    gguf_file = _gguf_file(model)
    # a GGUF file that is called as the model passes for the model, as a folder does
    is_its_file = gguf_file is not None and _same_name(display_name(name, gguf_file), display_name(recorded))
    if name and recorded and not (_same_name(name, recorded) or is_its_file):
        warnings.warn(
            f"The adapter was trained on {recorded!r}, and this base model is {name!r}: the gates fit its shapes, but "
            "may misjudge its hidden states. Load the base that the adapter names, or ignore this if it is a copy.",
            BaseMismatchWarning,
            stacklevel=2,
        )
    elif revision and recorded_revision and revision != recorded_revision:
        warnings.warn(
            f"The adapter was trained on revision {recorded_revision} of {recorded!r}, and this base model is of "
            f"revision {revision}. Load that revision, or ignore this if the weights are equal.",
            BaseMismatchWarning,
            stacklevel=2,
        )
    recorded_rounding, found = config.base_rounding, rounding(model)
    if recorded_rounding and found and recorded_rounding != found:
        warnings.warn(
            f"The adapter was trained on {_weights(recorded_rounding)}, and this base model has {_weights(found)}: "
            "hidden states of another rounding of one base differ a little. Measure with retention-gates evaluate "
            "what that costs, or load the weights that the adapter was trained on.",
            BaseMismatchWarning,
            stacklevel=2,
        )


def identity(model: Any) -> tuple[str, str | None]:
    """Name (or folder; empty if unknown) and commit of a loaded base model, as far as it says.

    The commit is known of a model that our commands or older transformers have loaded, and of a snapshot's folder.
    """
    name, revision = _split_snapshot(getattr(model, "name_or_path", "") or "")
    return name, noted_commit(model.config) or revision


def note_file(config: Any, gguf_file: str, file_rounding: str | None) -> None:
    """Notes in a model's config the GGUF file that its weights are from, and how they were rounded there."""
    config.gguf_source = {"file": gguf_file, "rounding": file_rounding}


def rounding(model: Any) -> str | None:
    """Of the base model's weights: none, Q4_K_M as GGUF files say, bitsandbytes-4bit, ...; None if it does not say."""
    config = model.config
    if source := getattr(config, "gguf_source", None):
        return WHOLE if source["rounding"] in WHOLE_TYPES else source["rounding"]
    quantization = getattr(config, "quantization_config", None)
    if quantization is None:
        return WHOLE
    said = quantization if isinstance(quantization, dict) else quantization.to_dict()
    method = said.get("quant_method")
    if method is None:
        return None
    bits = [f"-{bits}bit" for bits in (4, 8) if said.get(f"load_in_{bits}bit")]
    return f"{getattr(method, 'value', method)}{bits[0] if bits else ''}"


def _weights(name: str) -> str:
    return "whole weights" if name == WHOLE else f"weights rounded to {name}"


def display_name(name: str, gguf_file: str | None = None) -> str:
    """The name of a base model for titles and reports: SmolLM2-135M-Instruct.

    It is the last part of a name on the Hub or of a folder, where the Hub's cache counts as the Hub. A GGUF file is
    named after its model, whatever its folder is called, unless its name is as general as model.gguf.
    """
    if gguf_file is not None:
        file_name = QUANTISATION.sub("", Path(gguf_file).name.removesuffix(".gguf"), count=1)
        if file_name.lower() not in UNNAMED:
            return file_name
    name = _split_snapshot(name)[0]
    return Path(os.path.abspath(name)).name or name


def _gguf_file(model: Any) -> str | None:
    """The GGUF file that the weights were read from, as our commands or transformers note it."""
    if source := getattr(model.config, "gguf_source", None):
        return source["file"]
    quantization = getattr(model.config, "quantization_config", None)
    return getattr(quantization, "gguf_file", None)


def fingerprint(model: Any, rope_parameters: Any = None) -> str:
    """16 hexadecimal digits that tell a base model's weights from others, whatever it is called.

    Looks at some numbers of every parameter, spread over it, and not at the gates: milliseconds, where a hash of all
    weights takes seconds. Parameters count in no order and without their names, which differ between versions of
    transformers. A guard against mistakes, not against who makes a model to pass for another.
    """
    samples = []
    for name, parameter in model.named_parameters():
        if ".retention_gate." in name:
            continue
        flat = parameter.detach().reshape(-1)
        if flat.is_meta:  # its numbers are offloaded
            flat = flat.new_empty(0, device="cpu")
        sample = flat[:: max(1, len(flat) // SAMPLED)][:SAMPLED].contiguous().view(torch.uint8).cpu()
        samples.append(f"{parameter.dtype} {list(parameter.shape)} ".encode() + sample.numpy().tobytes())
    hashed = hashlib.sha256(json.dumps(rope_parameters, sort_keys=True, default=str).encode())
    for one in sorted(hashlib.sha256(sample).digest() for sample in samples):
        hashed.update(one)
    return hashed.hexdigest()[:16]


def _split_snapshot(name: str) -> tuple[str, str | None]:
    """A snapshot folder of the Hub's cache as the name and commit it stands for; other names as they are."""
    parts = Path(name).parts
    if len(parts) >= 3 and parts[-2] == "snapshots" and parts[-3].startswith("models--"):
        return parts[-3].removeprefix("models--").replace("--", "/"), parts[-1]
    return name, None


def _same_name(one: str, other: str) -> bool:
    if one.lower() == other.lower():
        return True
    # a copy in a folder that is called as the model is (/models/Qwen3-4B, Qwen/Qwen3-4B) passes for the model
    return (_is_local(one) or _is_local(other)) and Path(one).name.lower() == Path(other).name.lower()


def _is_local(name: str) -> bool:
    return name.startswith((".", "/")) or Path(name).is_absolute() or Path(name).is_dir()


def check_same(name: str, adapter: Any, base: Any) -> None:
    """Raises ValueError where what the adapter was made for is not what the base has."""
    if adapter != base:
        raise ValueError(
            f"The adapter was made for a base model with {name} = {_short(adapter)}, but this one has {_short(base)}: "
            "load the base model named in its adapter_config.json."
        )


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 120 else text[:117] + "..."
