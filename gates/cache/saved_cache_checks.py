"""A memory file is data from strangers: what is checked before any of it reaches a cache.

As for adapters (adapter/checks.py), no size that the file states is trusted: its description is read up to a limit,
and tensors are looked at one layer at a time in the mapped file, after their shapes were found to be the cache's.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass, fields
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

from retention_gates.gates.adapter.checks import HEADER_BYTES_PER_TENSOR, MOST_CONFIG_BYTES, shown
from retention_gates.gates.adapter.safetensors_header import read_header
from retention_gates.gates.cache.pool import Pool
from retention_gates.gates.policies.eviction_rule import MOST_SPANS, MOST_TOKENS

FORMAT = 1
METADATA_KEY = "retention_gates_memory"
AGAIN = "read the text and save the memory again"
MOST_TENSORS = 20_000
DTYPES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16", torch.int64: "I64"}
DTYPES |= {torch.bool: "BOOL", torch.uint8: "U8"}


@dataclass(frozen=True)
class Description:
    """The description in a memory file's metadata, as JSON."""

    model: str  # its name, for people
    fingerprint: str  # of its weights, see adapter/base_identity.py
    adapter: str | None  # SHA-256 of the gates; None if the policy needs none
    budget_shares: str | None  # SHA-256 of those that calibrated budgets follow, else None
    memory_size: int
    policy: str
    budgets_from: str  # "uniform", "calibrated", ..., or "lists"
    budgets: list[list[int]]  # [gated layers][KV heads]
    protected: list[list[int]]  # spans start, stop; the first is that of the first tokens
    reserved: list[list[int]]  # start, stop, entries
    buffer_size: int
    seed: int
    layers: list[int]  # indices of the gated ones
    dtype: str  # of keys and values, as the model makes them
    cache_dtype: str | None  # how they are stored, if otherwise
    rows: int
    tokens: int  # columns read
    format: int = FORMAT

    def to_json(self) -> str:
        return json.dumps(vars(self))

    @classmethod
    def from_json(cls, text: Any, path: str | Path) -> "Description":
        """Raises ValueError unless every value is there and of its type; what the values are good for comes later."""
        try:
            content = json.loads(text)
        except (TypeError, ValueError, RecursionError) as error:
            raise ValueError(f"{path} holds no memory of retention gates: save one with cache.save(path).") from error
        if not isinstance(content, dict):
            raise ValueError(f"{path} describes its memory by a {type(content).__name__}: {AGAIN}.")
        if content.get("format") != FORMAT:
            raise ValueError(
                f"{path} is a memory file of format {shown(repr(content.get('format')))}, and this version of "
                f"retention-gates reads format {FORMAT}: pip install -U retention-gates, or {AGAIN}."
            )
        known = {field.name: field.type for field in fields(cls)}
        problems = [f"lacks {name}" for name in known.keys() - content.keys()]
        problems += [f"has an unknown {shown(name)}" for name in content.keys() - known.keys()]
        problems += [
            f"has {name}={shown(repr(content[name]))}"
            for name in known.keys() & content.keys()
            if not _is_a(known[name], content[name])
        ]
        if not problems:
            said = cls(**content)
            if said.rows < 1:
                problems.append(f"has rows={said.rows}, which must be at least 1")
            if not 1 <= said.tokens <= MOST_TOKENS:
                problems.append(f"has tokens={said.tokens}, where a cache counts from 1 to {MOST_TOKENS}")
            if len(said.protected) > MOST_SPANS or len(said.reserved) > MOST_SPANS:
                problems.append(f"has more than {MOST_SPANS} protected or reserved spans")
            if not said.protected or said.protected[0][:1] != [0] or any(len(span) != 2 for span in said.protected):
                problems.append("has protected spans that are not [start, stop], the first from 0")
        if problems:
            listed = "; ".join(sorted(problems)[:5])
            raise ValueError(f"{path} describes no memory: it {listed}. {AGAIN.capitalize()}.")
        return said


def _is_a(kind: Any, value: Any) -> bool:
    if kind == list[list[int]]:
        return isinstance(value, list) and all(_is_a(list[int], row) for row in value)
    if kind == list[int]:
        return isinstance(value, list) and all(_is_a(int, one) for one in value)
    return isinstance(value, kind) and not isinstance(value, bool)


def read_memory_header(path: str | Path) -> tuple[dict[str, Any], Description]:
    """Reads a memory file's list of tensors and its description.

    Raises:
        ValueError: if there is no such file, or none that holds a memory.
    """
    if not Path(path).is_file():
        raise ValueError(f"There is no file {path}: save a memory there with cache.save(path).")
    header = read_header(path, MOST_CONFIG_BYTES + HEADER_BYTES_PER_TENSOR * MOST_TENSORS, AGAIN)
    metadata = header.pop("__metadata__", None)
    text = metadata.get(METADATA_KEY) if isinstance(metadata, dict) else None
    if isinstance(text, str) and len(text) > MOST_CONFIG_BYTES:
        raise ValueError(f"{path} describes its memory in more than {MOST_CONFIG_BYTES} bytes: {AGAIN}.")
    return header, Description.from_json(text, path)


def check_shapes(header: dict[str, Any], expected: dict[str, tuple[list[int], torch.dtype]], path: str | Path) -> None:
    """Raises ValueError unless the file has exactly the expected tensors, naming up to five problems."""
    problems = [f"unexpected {shown(key)}" for key in header.keys() - expected.keys()]
    problems += [f"missing {key}" for key in expected.keys() - header.keys()]
    for key in header.keys() & expected.keys():
        entry, (shape, dtype) = header[key], expected[key]
        given = (entry.get("shape"), entry.get("dtype")) if isinstance(entry, dict) else (None, None)
        if given != (shape, DTYPES[dtype]):
            problems.append(f"{key} is {shown(str(given[1]))} {shown(str(given[0]))}, not {DTYPES[dtype]} {shape}")
    refuse_memory(path, problems)


def check_numbers(name: str, tensor: torch.Tensor) -> list[str]:
    """Describes the faults of a floating tensor: an inf has a meaning in scores and priorities only, NaN nowhere."""
    if not tensor.is_floating_point():
        return []
    if name.rpartition(".")[2] in ("score", "priority"):
        wrong = tensor.isnan() | (tensor == float("-inf"))
    else:
        wrong = ~tensor.isfinite()
    return [f"{name} has NaN or infinite values"] if bool(wrong.any()) else []


def _check_columns(name: str, state: dict[str, torch.Tensor], tokens: int) -> list[str]:
    positions, start = state["slot_positions"], state["start"]  # [B, N], [B]
    if bool(((positions < -1) | (positions >= tokens)).any()):
        return [f"{name}.slot_positions are not all from -1 to {tokens - 1}"]
    if bool(((start < 0) | (start > tokens)).any()):
        return [f"{name}.start is not from 0 to {tokens}"]
    return []


def check_pool(name: str, state: dict[str, torch.Tensor], pool: Pool, tokens: int) -> list[str]:
    """Describes the faults of the positions in a pool, after `tokens` columns have been read."""
    positions, owner = state["slot_positions"], state["owner"]  # [B, P]
    problems = _check_columns(name, state, tokens)
    owners = pool.layers * pool.heads
    if problems or bool(((owner < 0) | (owner >= owners)).any()):
        return problems or [f"{name}.owner is not from 0 to {owners - 1}"]
    free = (positions < 0).sum(1)
    of_layer = torch.where(positions >= 0, owner // pool.heads, pool.layers)
    counts = torch.stack([(of_layer == layer).sum(1) for layer in range(pool.layers)])
    if bool((free < owners).any()) or bool((counts > pool.most).any()):
        return [f"{name} holds more entries than there is room for"]
    entries = (positions * owners + owner).masked_fill(positions < 0, -1).sort(dim=1).values
    if bool(((entries[:, 1:] == entries[:, :-1]) & (entries[:, 1:] >= 0)).any()):
        return [f"{name} has a head that holds a position twice"]
    return []


def check_slots(name: str, state: dict[str, torch.Tensor], offsets: Sequence[int], tokens: int) -> list[str]:
    """Describes the faults of the positions in a layer, after `tokens` columns have been read."""
    problems = _check_columns(name, state, tokens)
    if problems:
        return problems
    held = state["slot_positions"].masked_fill(state["pending"], -1)
    for first, stop in pairwise(offsets):
        own = held[:, first:stop].sort(dim=1).values
        if bool((own[:, 0] >= 0).any()):
            return [f"{name} has a head without a free slot"]
        if bool(((own[:, 1:] == own[:, :-1]) & (own[:, 1:] >= 0)).any()):
            return [f"{name} has a head that holds a position twice"]
    return []


def refuse_memory(path: str | Path, problems: list[str]) -> None:
    """Raises ValueError if there are any problems, naming the first five."""
    if problems:
        more = f"; and {len(problems) - 5} more" if len(problems) > 5 else ""
        raise ValueError(
            f"{path} does not hold the memory that it describes: {'; '.join(sorted(problems)[:5])}{more}. "
            f"{AGAIN.capitalize()}."
        )
