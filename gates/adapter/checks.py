"""An adapter is data from strangers: what is checked before any of it reaches a model.

Nothing here trusts a size that the files state. Headers are read up to a limit that follows from the number of gates,
and tensors are looked at one at a time in the mapped file: a wrong adapter costs no more memory than a right one.
"""

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from retention_gates.gates.adapter.safetensors_header import not_safetensors, read_header

MOST_SHARE = 1e12  # tokens of retained mass
MOST_CONFIG_BYTES = 512 * 1024  # a config with budget shares of 128 layers of 64 heads has 250 KiB


HEADER_BYTES_PER_TENSOR, HEADER_BYTES_MORE = (
    512,
    4096,
)  # an entry has about 170 bytes, names of 110 characters included


DTYPES = ("F32", "BF16", "F16")


WAY_OUT = "Save or download the adapter again, and load it on the base model it was trained for."


AGAIN = "save or download the adapter again"


KEY = ".retention_gate."


# what gives the weights their meaning
DIGESTED = (
    "gate_type", "gate_width", "activation", "protected_tokens", "gated_layers", "hidden_size", "num_key_value_heads"
)  # fmt: skip


def check_config_size(path: str | Path) -> None:
    """Raises ValueError for a config so large that parsing it could exhaust the memory."""
    size = Path(path).stat().st_size
    if size > MOST_CONFIG_BYTES:
        raise ValueError(
            f"{path} has {size} bytes, where a config of gates has at most {MOST_CONFIG_BYTES}: save or download the "
            "adapter again."
        )


def check_weights(path: str | Path, shapes: dict[str, list[int]], layers: int) -> None:
    """Reads the weights of an adapter without a model, and refuses any that no gate of its config could have.

    Args:
        path: a safetensors file.
        shapes: parameter name within a gate -> shape.
        layers: the number of gates.

    Raises:
        ValueError: naming up to five problems: keys, shapes, dtypes, values that are not finite, or a file that is
            none of safetensors.
    """
    most = HEADER_BYTES_MORE + HEADER_BYTES_PER_TENSOR * len(shapes) * layers
    header = read_header(path, most, AGAIN)
    header.pop("__metadata__", None)
    problems = _problems(header, shapes, layers)
    if not problems:
        try:
            with safe_open(path, framework="pt") as file:
                for key in file.keys():  # noqa: SIM118  it cannot be iterated itself
                    if not file.get_tensor(key).isfinite().all():
                        problems.append(f"{shown(key)} has NaN or infinite values")
        except SafetensorError as error:
            raise not_safetensors(path, str(error), AGAIN) from error
    refuse(problems)


def refuse(problems: list[str]) -> None:
    """Raises ValueError if there are any problems, naming the first five."""
    if problems:
        more = f"; and {len(problems) - 5} more" if len(problems) > 5 else ""
        raise ValueError(
            "The adapter's weights do not fit its config and this base model: "
            f"{'; '.join(sorted(problems)[:5])}{more}. {WAY_OUT}"
        )


def file_digest(path: str | Path, config: dict[str, Any]) -> str:
    """As `digest`, of the tensors of a safetensors file."""
    with safe_open(path, framework="pt") as file:
        return digest(((key, file.get_tensor(key)) for key in sorted(file.keys())), config)


def digest(tensors: Iterable[tuple[str, torch.Tensor]], config: dict[str, Any]) -> str:
    """SHA-256 of gates and of those values of the config that give them their meaning.

    Args:
        tensors: keys and tensors, by sorted key. What comes before `.retention_gate.` is not hashed, because names of
            modules may differ between versions of transformers; the order of the layers is.
    """
    hashed = hashlib.sha256(json.dumps({name: config[name] for name in DIGESTED}, sort_keys=True).encode())
    for key, tensor in tensors:
        hashed.update(f"{key.rpartition(KEY)[2]} {tensor.dtype} {list(tensor.shape)}".encode())
        hashed.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().data)
    return hashed.hexdigest()


def check_digest(found: str, config: dict[str, Any]) -> None:
    """Raises ValueError if the config states a digest, and it is not the one found."""
    if config["weights_sha256"] not in (None, found):
        raise ValueError(
            "The adapter's weights are not those that were saved with its adapter_config.json, or the config was "
            f"changed (SHA-256 differs). {WAY_OUT}"
        )


def is_budget_share(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and 0 <= value <= MOST_SHARE


def number(value: object) -> str:
    """A value as an error may show it, also an integer with more digits than Python writes."""
    if isinstance(value, int) and abs(value) >= 10**20:
        return f"{'-' * (value < 0)}2^{value.bit_length() - 1}..."
    return shown(repr(value))


def shown(name: str) -> str:
    """A name out of a file as an error may show it: no control characters, not too long."""
    text = name if name.isprintable() else repr(name)
    return text if len(text) <= 120 else text[:117] + "..."


def _problems(header: dict[str, Any], shapes: dict[str, list[int]], layers: int) -> list[str]:
    problems, modules = [], set()
    for key in header:
        module, found, parameter = key.rpartition(KEY)
        if found and parameter in shapes:
            modules.add(module)
        else:
            problems.append(f"unexpected {shown(key)}")
    for module in modules:
        for parameter, shape in shapes.items():
            key = f"{module}{KEY}{parameter}"
            entry = header.get(key)
            if entry is None:
                problems.append(f"missing {shown(key)}")
            elif not isinstance(entry, dict):
                problems.append(f"{shown(key)} is described by a {type(entry).__name__}")
            elif entry.get("shape") != shape:
                problems.append(f"{shown(key)} has shape {shown(str(entry.get('shape')))}, not {shape}")
            elif entry.get("dtype") not in DTYPES:
                given = shown(str(entry.get("dtype")))
                problems.append(f"{shown(key)} is {given}, not floating point of 32 or 16 bits ({', '.join(DTYPES)})")
    if not problems and len(modules) != layers:
        problems.append(f"missing or too many gates: {len(modules)} are stored, the config has {layers} gated layers")
    return problems


def check_state_dict(
    place: str, own: dict[str, torch.Tensor], remapped: dict[str, torch.Tensor], shared: tuple[str, ...]
) -> None:
    """Raises ValueError unless every gate of an adapter gets all of its weights, and nothing is left over.

    Args:
        place: what the keys of the adapter's gates contain, ".retention_gate.default." say.
        own: the model's tensors; remapped: those of the file, under the model's keys.
        shared: modules of a gate that all layers have in common.
    """
    expected = {key: tensor for key, tensor in own.items() if place in key}
    problems = [f"missing {key}" for key in expected.keys() - remapped.keys()]
    problems += [f"unexpected {key}" for key in remapped.keys() - expected.keys()]
    for key in expected.keys() & remapped.keys():
        if expected[key].shape != remapped[key].shape:
            problems.append(f"{key} has shape {list(remapped[key].shape)}, not {list(expected[key].shape)}")
        elif not remapped[key].is_floating_point():
            problems.append(f"{key} is {remapped[key].dtype}, not floating point")
        elif not remapped[key].isfinite().all():
            problems.append(f"{key} has NaN or infinite values")
    first: dict[str, str] = {}
    for key in sorted(expected.keys() & remapped.keys()) if not problems else ():
        parameter = key.partition(place)[2]
        original = first.setdefault(parameter, key) if parameter.split(".")[0] in shared else key
        if not torch.equal(remapped[key], remapped[original]):
            problems.append(f"{key} differs from {original}, though all layers share it")
    refuse(problems)
