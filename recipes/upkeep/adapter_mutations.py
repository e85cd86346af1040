"""The ways in which `fuzz_adapter` damages an adapter: functions of a random generator and the adapter's folder."""

import json
import pickle
import random
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

CONFIG, WEIGHTS, CANARY = "adapter_config.json", "adapter_model.safetensors", "canary"
Mutation = Callable[[random.Random, Path], None]
PATH_TRICKS = (
    "../../../etc/passwd", "/etc/passwd", "..\\..\\windows\\win.ini", "~/.ssh/id_rsa", "a\x00b", "$(touch canary)",
    "base_model.model/../x.retention_gate.output.bias", "\x1b[2J", "file:///etc/passwd", "C:\\x", "a\nb", "." * 5000,
)  # fmt: skip
JSON_VALUES: tuple[Any, ...] = (
    None,
    True,
    0,
    -1,
    1.5,
    10**30,
    10**400,
    -(10**400),
    "",
    "\x00",
    "x" * 10000,
    [],
    [[]],
    {},
    {"a": 1},
    float("nan"),
    [None],
    "../..",
)
MIB = 2**20


class RunsCode:
    """An object like that of a malicious pickle: unpickling it makes a file."""

    def __init__(self, target: Path):
        self.target = target

    def __reduce__(self) -> tuple[Any, ...]:
        return (open, (str(self.target), "w"))


def read_header(folder: Path) -> tuple[dict[str, Any], bytes]:
    content = (folder / WEIGHTS).read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    return json.loads(content[8 : 8 + length]), content[8 + length :]


def write_header(folder: Path, header: Any, data: bytes) -> None:
    text = json.dumps(header).encode()
    (folder / WEIGHTS).write_bytes(struct.pack("<Q", len(text)) + text + data)


def read_config(folder: Path) -> dict[str, Any]:
    return json.loads((folder / CONFIG).read_text(encoding="utf-8"))


def write_config(folder: Path, config: Any) -> None:
    (folder / CONFIG).write_text(json.dumps(config), encoding="utf-8")


def _tensor(rng: random.Random, header: dict[str, Any]) -> str:
    return rng.choice([key for key in header if key != "__metadata__"])


def _nothing(rng: random.Random, folder: Path) -> None:
    """The control: what an adapter that is whole costs."""


def _truncate(file: str) -> Mutation:
    def mutate(rng: random.Random, folder: Path) -> None:
        content = (folder / file).read_bytes()
        (folder / file).write_bytes(content[: rng.choice([0, 1, 7, 8, 9, rng.randrange(len(content))])])

    return mutate


def _flip_bits(file: str, of_header: bool = False) -> Mutation:
    def mutate(rng: random.Random, folder: Path) -> None:
        content = bytearray((folder / file).read_bytes())
        end = 8 + struct.unpack("<Q", content[:8])[0] if of_header else len(content)
        for _ in range(rng.choice([1, 1, 1, 8])):
            content[rng.randrange(end)] ^= 1 << rng.randrange(8)
        (folder / file).write_bytes(content)

    return mutate


def _append(rng: random.Random, folder: Path) -> None:
    with (folder / rng.choice([CONFIG, WEIGHTS])).open("ab") as file:
        file.write(rng.randbytes(rng.choice([1, 100, 100_000])))


def _oversized_header(rng: random.Random, folder: Path) -> None:
    _, data = read_header(folder)
    length = rng.choice([2**64 - 1, 2**63, 10**12, 200 * MIB, len(data) + 1])
    (folder / WEIGHTS).write_bytes(struct.pack("<Q", length) + b"{" + data)


def _many_tensors(rng: random.Random, folder: Path) -> None:
    header, data = read_header(folder)
    empty = {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}
    write_header(folder, {**header, **{f"t{i}": empty for i in range(rng.choice([30, 5_000, 100_000]))}}, data)


def _nested_header(rng: random.Random, folder: Path) -> None:
    depth = rng.choice([500, 5_000, 500_000])
    text = b'{"a":' + b"[" * depth + b"]" * depth + b"}"
    (folder / WEIGHTS).write_bytes(struct.pack("<Q", len(text)) + text)


def _wrong_dtype(rng: random.Random, folder: Path) -> None:
    header, data = read_header(folder)
    kinds = ["I32", "U32", "F16", "BF16", "F64", "I64", "BOOL", "F8_E4M3", "C64", "X", 7, None]
    header[_tensor(rng, header)]["dtype"] = rng.choice(kinds)
    write_header(folder, header, data)


def _saved_as_another_dtype(rng: random.Random, folder: Path) -> None:
    tensors = load_file(folder / WEIGHTS)
    chosen = rng.sample(sorted(tensors), rng.choice([1, len(tensors)]))
    dtype = rng.choice([torch.float64, torch.int32, torch.bool, torch.complex64, torch.int8])
    save_file({k: t.to(dtype) if k in chosen else t for k, t in tensors.items()}, folder / WEIGHTS)


def _not_finite(rng: random.Random, folder: Path) -> None:
    header, data = read_header(folder)
    content = bytearray(data)
    offset = 4 * rng.randrange(len(data) // 4)
    content[offset : offset + 4] = struct.pack("<f", rng.choice([float("nan"), float("inf"), -float("inf")]))
    write_header(folder, header, bytes(content))


def _path_tricks(rng: random.Random, folder: Path) -> None:
    trick = rng.choice(PATH_TRICKS)
    if rng.random() < 0.5:
        header, data = read_header(folder)
        header[trick] = header.pop(_tensor(rng, header))
        write_header(folder, header, data)
    else:
        config = read_config(folder)
        config[rng.choice(["base_model_name_or_path", "revision", "target_modules", "activation", trick])] = trick
        write_config(folder, config)


def _huge_shape(rng: random.Random, folder: Path) -> None:
    header, data = read_header(folder)
    header[_tensor(rng, header)]["shape"] = rng.choice(
        [[2**62], [2**31, 2**31], [10**12, 1], [-1], ["8"], 8, None, [0] * 999]
    )
    write_header(folder, header, data)


def _offsets(rng: random.Random, folder: Path) -> None:
    header, data = read_header(folder)
    entry = header[_tensor(rng, header)]
    start, stop = entry["data_offsets"]
    entry["data_offsets"] = rng.choice(
        [[0, stop - start], [start, 2**63], [stop, start], [-8, stop], [start + 4, stop + 4], [start], "x", None]
    )
    write_header(folder, header, data)


def _unknown_tensor(rng: random.Random, folder: Path) -> None:
    tensors = load_file(folder / WEIGHTS)
    like = rng.choice(sorted(tensors))
    name = rng.choice(
        [like.replace("layers.0", "layers.9"), like + "2", like.replace("hidden", "lora_A"), "lm_head.weight"]
    )
    save_file({**tensors, name: torch.zeros(3)}, folder / WEIGHTS)


def _missing_tensor(rng: random.Random, folder: Path) -> None:
    tensors = load_file(folder / WEIGHTS)
    for key in rng.sample(sorted(tensors), rng.choice([1, 3, len(tensors)])):
        del tensors[key]
    save_file(tensors, folder / WEIGHTS)


def _swapped_layers(rng: random.Random, folder: Path) -> None:
    header, data = read_header(folder)
    names = [key for key in header if "hidden.weight" in key]
    one, other = rng.sample(names, 2)
    header[one], header[other] = header[other], header[one]
    write_header(folder, header, data)


def _large_text(rng: random.Random, folder: Path) -> None:
    write_config(folder, {**read_config(folder), rng.choice(["revision", "notes"]): "x" * (10 * MIB)})


def _large_list(rng: random.Random, folder: Path) -> None:
    key = rng.choice(["budget_shares", "gated_layers", "notes"])
    value = rng.choice([[[]] * (2 * MIB), [0] * (3 * MIB), [[1.0] * MIB] * 2])
    write_config(folder, {**read_config(folder), key: value})


def _nested_config(rng: random.Random, folder: Path) -> None:
    depth = rng.choice([900, 5_000, 100_000])
    (folder / CONFIG).write_text(
        '{"peft_type": "RETENTION_GATE", "a": ' + "[" * depth + "]" * depth + "}", encoding="utf-8"
    )


def _unknown_key(rng: random.Random, folder: Path) -> None:
    write_config(folder, {**read_config(folder), rng.choice(["gate_widht", "auto_map", "_target_", "__class__"]): 1})


def _any_value(rng: random.Random, folder: Path) -> None:
    config = read_config(folder)
    config[rng.choice(sorted(config))] = rng.choice(JSON_VALUES)
    write_config(folder, config)


def _huge_gate(rng: random.Random, folder: Path) -> None:
    key = rng.choice(["gate_width", "hidden_size", "num_key_value_heads", "protected_tokens"])
    write_config(folder, {**read_config(folder), key: rng.choice([2**20, 2**31, 2**62, 10**30])})


def _hostile_pattern(rng: random.Random, folder: Path) -> None:
    """Gives a pattern that PEFT would match with the names of all modules."""
    pattern = rng.choice(["(", "\\", "(a|a)" * 40 + "b", r"(\w|\w)" * 4000, "[", "a|" * 40_000, r"a\.(0)\.b" * 9000])
    write_config(folder, {**read_config(folder), "target_modules": pattern})


def _another_gate(rng: random.Random, folder: Path) -> None:
    change: dict[str, Any] = rng.choice(
        [{"gate_type": "linear"}, {"gate_type": "tied_mlp"}, {"activation": "relu"}, {"gated_layers": [0, 1, 2]},
         {"gated_layers": [0, 1, 2, 3, 4]}, {"gated_layers": [3, 2, 1, 0]}, {"layers_to_transform": [1]},
         {"protected_tokens": 0}]
    )  # fmt: skip
    write_config(folder, {**read_config(folder), **change})


def _another_method(rng: random.Random, folder: Path) -> None:
    kind = rng.choice(["LORA", "IA3", "PROMPT_TUNING", "retention_gate", "NOTHING", 7, None])
    config: dict[str, Any] = {"peft_type": kind, "r": 8, "target_modules": ["q_proj"], "task_type": "CAUSAL_LM"}
    write_config(folder, config if rng.random() < 0.7 else {**read_config(folder), "peft_type": kind})


def _pickled(rng: random.Random, folder: Path) -> None:
    content = pickle.dumps(RunsCode(folder.parent / CANARY))
    (folder / WEIGHTS).unlink()
    (folder / rng.choice([WEIGHTS, "adapter_model.bin"])).write_bytes(content)


def _not_a_file(rng: random.Random, folder: Path) -> None:
    file = folder / rng.choice([CONFIG, WEIGHTS])
    file.unlink()
    kind = rng.choice(["folder", "link to /dev/zero", "link to itself", "missing"])
    if kind == "folder":
        file.mkdir()
    elif kind != "missing":
        file.symlink_to("/dev/zero" if "zero" in kind else file)


def _garbage(rng: random.Random, folder: Path) -> None:
    (folder / rng.choice([CONFIG, WEIGHTS])).write_bytes(rng.randbytes(rng.choice([10, 1000, MIB])))


def _each_other(rng: random.Random, folder: Path) -> None:
    config, weights = (folder / CONFIG).read_bytes(), (folder / WEIGHTS).read_bytes()
    (folder / CONFIG).write_bytes(weights)
    (folder / WEIGHTS).write_bytes(config)


MUTATIONS: dict[str, Mutation] = {
    "nothing": _nothing,
    "truncated weights": _truncate(WEIGHTS),
    "truncated config": _truncate(CONFIG),
    "bits of the weights": _flip_bits(WEIGHTS),
    "bits of the header": _flip_bits(WEIGHTS, of_header=True),
    "bits of the config": _flip_bits(CONFIG),
    "bytes appended": _append,
    "oversized header": _oversized_header,
    "many empty tensors": _many_tensors,
    "nested header": _nested_header,
    "wrong dtype": _wrong_dtype,
    "another dtype": _saved_as_another_dtype,
    "NaN and infinity": _not_finite,
    "path tricks": _path_tricks,
    "huge shapes": _huge_shape,
    "wrong offsets": _offsets,
    "unknown tensor": _unknown_tensor,
    "missing tensor": _missing_tensor,
    "swapped layers": _swapped_layers,
    "large config: text": _large_text,
    "large config: list": _large_list,
    "nested config": _nested_config,
    "unknown key": _unknown_key,
    "any value": _any_value,
    "huge gate": _huge_gate,
    "hostile pattern": _hostile_pattern,
    "another gate": _another_gate,
    "another method": _another_method,
    "pickle": _pickled,
    "not a file": _not_a_file,
    "garbage": _garbage,
    "files swapped": _each_other,
}
