"""Memories on disk: the entries of a bounded cache in one safetensors file, which names their model and gates.

The file's metadata names the base model (with a fingerprint of its weights), the adapter (with a digest of its gates),
and all that decides what is kept from here on. Any other model, adapter or dtype is refused.
"""

import hashlib
import json
import os
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer, LinearAttentionLayer

from retention_gates.gates.adapter.base_identity import fingerprint, identity
from retention_gates.gates.adapter.checks import digest
from retention_gates.gates.adapter.families import text_config
from retention_gates.gates.adapter.model import RetentionGateModel, find_gated_model
from retention_gates.gates.adapter.placement import BACK, device_of
from retention_gates.gates.adapter.safetensors_header import not_safetensors
from retention_gates.gates.attention.cache_layer import EvictingLayer
from retention_gates.gates.cache.saved_cache_checks import (
    AGAIN,
    METADATA_KEY,
    Description,
    check_numbers,
    check_shapes,
    read_memory_header,
    refuse_memory,
)
from retention_gates.gates.cache.window_layer import WindowLayer
from retention_gates.gates.policies import POLICIES, as_feedback

if TYPE_CHECKING:
    from retention_gates.gates.cache.bounded_cache import BoundedCache

# layers beside the gated ones whose state is known
OF_TRANSFORMERS = (DynamicLayer, DynamicSlidingWindowLayer, WindowLayer, LinearAttentionLayer)


def save_memory(cache: "BoundedCache", gated: RetentionGateModel, path: str | os.PathLike) -> None:
    """Writes what the cache holds; the file is whole or it is not there."""
    target = Path(os.path.realpath(path))  # what a link points to is replaced, and not the link
    if target.is_dir() or not target.parent.is_dir():
        raise ValueError(f"{path} cannot be written: name a file in a folder that exists.")
    if target.exists() and not target.is_file():
        raise ValueError(f"{path} is a device, a pipe or a socket and not a file, and would be replaced: name a file.")
    description = _describe(cache, gated)
    tensors = {key: tensor.detach().cpu().contiguous() for key, tensor, _ in _state(cache)}
    problems = [problem for key, tensor in tensors.items() for problem in check_numbers(key, tensor)]
    for layer in cache.gated_layers:  # numbers of 8 bits are looked at as they are read back
        problems += layer.check_saved(f"layers.{layer.rule.layer}", layer.saved_state(), description.tokens)
    if problems:
        raise ValueError(
            f"The memory cannot be saved: {'; '.join(problems[:5])}. The model made numbers that its dtype cannot "
            "hold: load it in another dtype."
        )
    temporary = target.with_name(f"{target.name}.{os.getpid()}.tmp")
    try:
        save_file(tensors, temporary, metadata={"format": "pt", METADATA_KEY: description.to_json()})
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)


def load_memory(kind: type["BoundedCache"], model: Any, path: str | os.PathLike, **wanted: Any) -> "BoundedCache":
    """A cache that holds what the file does. `wanted`: values of `Description` that are asked for, None for any."""
    path = Path(path)
    header, said = read_memory_header(path)
    gated = find_gated_model(model)
    _check_origin(path, said, gated)
    for name, value in wanted.items():
        found = getattr(said, name)
        if value is not None and value != found:
            raise ValueError(
                f"{path} is a memory of {name.removesuffix('_from')}={found!r}, not {value!r}: leave it out, or "
                f"{AGAIN}."
            )
    try:
        with safe_open(path, framework="pt") as file:  # which compares the header with the file's length
            cache = _empty_like(kind, model, said, path, header)
            _learn_shapes(cache, gated)
            if str(cache.gated_layers[0].dtype) != said.dtype:
                raise ValueError(
                    f"{path} holds {said.dtype}, and this model makes {cache.gated_layers[0].dtype}: load the model "
                    f"with dtype={said.dtype}."
                )
            shapes = {key: (_shape(key, tensor, layer, said), tensor.dtype) for key, tensor, layer in _state(cache)}
            check_shapes(header, shapes, path)
            with torch.inference_mode(False), torch.no_grad():
                for index, layer in enumerate(cache.layers):
                    _fill(layer, f"layers.{index}", file, said, path)
    except SafetensorError as error:
        raise not_safetensors(path, str(error), AGAIN) from error
    return cache


def _describe(cache: "BoundedCache", gated: RetentionGateModel) -> Description:
    first = cache.gated_layers[0]
    rule = first.rule
    known = POLICIES.get(rule.policy.name)
    if known is None or rule.policy not in (known, as_feedback(known)):
        raise ValueError(
            f"policy={rule.policy.name!r} is your own, and a memory file can only name those of this package "
            f"({', '.join(POLICIES)}): keep the cache, or a cache.fork(), in the process."
        )
    if any(layer.is_empty or layer.is_attending or layer.passes != first.passes for layer in cache.gated_layers):
        raise ValueError(
            "There is no whole memory to save: nothing has been read with this cache, or the last forward pass broke "
            "off. Read a text with it first, after cache.reset()."
        )
    others = {type(layer).__name__ for layer in cache.layers if not isinstance(layer, EvictingLayer)}
    unknown = others - {kind.__name__ for kind in OF_TRANSFORMERS}
    if unknown:
        raise ValueError(
            f"This model's cache has {', '.join(sorted(unknown))} beside the gated layers, which a memory file cannot "
            "hold: keep the cache, or a cache.fork(), in the process."
        )
    name, revision = identity(gated.model)
    shares = cache.budget_shares if cache.budgets_from == "calibrated" else None
    return Description(
        model=f"{name}@{revision}" if revision else name,
        fingerprint=_fingerprint(gated),
        adapter=gates_digest(gated, first.adapter) if rule.policy.needs_gates else None,
        budget_shares=None if shares is None else _shares_digest(shares),
        memory_size=cache.memory_size,
        policy=rule.policy.name,
        budgets_from=cache.budgets_from if isinstance(cache.budgets_from, str) else "lists",
        budgets=cache.budgets,
        protected=[list(span) for span in cache.protected],
        reserved=[list(span) for span in cache.reserved],
        buffer_size=rule.buffer_size,
        seed=rule.seed,
        layers=[layer.rule.layer for layer in cache.gated_layers],
        dtype=str(first.dtype),
        cache_dtype=cache.cache_dtype,
        rows=first.batch_size,
        tokens=first.columns,
    )


def _check_origin(path: Any, said: Description, gated: RetentionGateModel) -> None:
    """Raises ValueError if the memory is another model's or other gates'."""
    name, own = identity(gated.model)[0], _fingerprint(gated)
    if said.fingerprint != own:
        raise ValueError(
            f"{path} is a memory of the model {said.model!r} (weights {said.fingerprint}), and this one is {name!r} "
            f"(weights {own}): load the model that it was made with, or {AGAIN}."
        )
    policy = POLICIES.get(said.policy)
    adapter = gated.active_adapters[0]
    if policy is not None and policy.needs_gates:
        own = gates_digest(gated, adapter)
        if said.adapter != own:
            raise ValueError(
                f"{path} is a memory of an adapter with the SHA-256 {str(said.adapter)[:16]}, and the gates of "
                f"{adapter!r} have {own[:16]}: load that adapter, or {AGAIN}."
            )
    shares = gated.active_config.budget_shares
    if said.budgets_from == "calibrated":
        own = _shares_digest(shares)
        if said.budget_shares != own:
            raise ValueError(
                f"{path} was made with calibrated budgets of the shares {str(said.budget_shares)[:16]}, and those of "
                f"{adapter!r} are {own[:16]}: load the adapter as it was then, or {AGAIN}."
            )
    if said.layers != (layers := [layer.layer_idx for layer in gated.gated_layers]):
        raise ValueError(f"{path} is a memory of the gated layers {said.layers}, and this adapter's are {layers}.")


def _empty_like(
    kind: type["BoundedCache"], model: Any, said: Description, path: Any, header: dict[str, Any]
) -> "BoundedCache":
    """An empty cache as described, if the file is large enough for it."""
    named = said.budgets_from in ("adaptive", "global")
    cache = kind(
        model,
        said.memory_size,
        policy=said.policy,
        budgets=said.budgets_from if named else said.budgets,
        protected_tokens=said.protected[0][1],
        buffer_size=said.buffer_size,
        seed=said.seed,
        cache_dtype=said.cache_dtype,
        reserved=[cast(Any, tuple(one)) for one in said.reserved],
    )
    for span in said.protected[1:]:
        cache.pin(*span)
    if said.budgets_from != "lists":
        cache.budgets_from = said.budgets_from
    if cache.budgets != said.budgets:
        raise ValueError(f"{path} has budgets that {said.budgets_from!r} does not give: {AGAIN}.")
    for layer in (one for one in cache.gated_layers if one.row_state):  # before anything of that size is allocated
        key = f"layers.{layer.rule.layer}.slot_positions"
        entry = header.get(key)
        if not isinstance(entry, dict) or entry.get("shape") != [said.rows, layer.slots] or entry["dtype"] != "I64":
            refuse_memory(path, [f"{key} is not I64 {[said.rows, layer.slots]}"])
    return cache


@torch.no_grad()
def _learn_shapes(cache: "BoundedCache", gated: RetentionGateModel) -> None:
    """Reads one token, which leaves the state of every layer in the shape, the dtype and the place that it has."""
    token = torch.zeros(1, 1, dtype=torch.int64, device=device_of(gated))
    gated(input_ids=token, past_key_values=cache, use_cache=True, last_hidden_state_only=True)


def _state(cache: "BoundedCache") -> Iterator[tuple[str, torch.Tensor, Any]]:
    """Key in the file, tensor and layer of all that the layers hold."""
    for index, layer in enumerate(cache.layers):
        for name, tensor in _state_of(layer).items():
            yield f"layers.{index}.{name}", tensor, layer


def _state_of(layer: Any) -> dict[str, torch.Tensor]:
    if isinstance(layer, EvictingLayer):
        return layer.saved_state()
    found: dict[str, Any] = {name: getattr(layer, name, None) for name in ("keys", "values")}
    for name in ("conv_states", "recurrent_states"):
        states = getattr(layer, name, None)
        found |= {f"{name}.{i}": one for i, one in states.items()} if isinstance(states, dict) else {name: states}
    return {name: tensor for name, tensor in found.items() if isinstance(tensor, torch.Tensor)}


def _shape(key: str, tensor: torch.Tensor, layer: Any, said: Description) -> list[int]:
    """The shape that a tensor has for the memory's rows and tokens, which one row of one token left like this."""
    shape = [said.rows, *tensor.shape[1:]]
    if isinstance(layer, DynamicLayer):
        shape[-2] = said.tokens
    if isinstance(layer, WindowLayer):
        shape[-2] = layer.sliding_window
    elif isinstance(layer, DynamicSlidingWindowLayer):
        shape[-2] = min(said.tokens, layer.sliding_window - 1)
    return shape


def _fill(layer: Any, name: str, file: Any, said: Description, path: Any) -> None:
    """Gives a layer its state from the file, checked."""
    places = {key: tensor.device for key, tensor in _state_of(layer).items()}
    state = {key: file.get_tensor(f"{name}.{key}") for key in places}
    problems = [problem for key, tensor in state.items() for problem in check_numbers(f"{name}.{key}", tensor)]
    if isinstance(layer, EvictingLayer):
        problems += layer.check_saved(name, state, said.tokens)
    refuse_memory(path, problems)
    state = {key: tensor.to(places[key], copy=True) for key, tensor in state.items()}
    if isinstance(layer, EvictingLayer):
        layer.restore(state, said.tokens)
        return
    for key, tensor in state.items():
        attribute, _, index = key.partition(".")
        if index:
            getattr(layer, attribute)[int(index)] = tensor
        else:
            setattr(layer, attribute, tensor)
    if isinstance(layer, DynamicSlidingWindowLayer):
        layer.cumulative_length = said.tokens
    if isinstance(layer, WindowLayer):
        layer.batch_size = said.rows
        layer.seen.fill_(said.tokens)


def _fingerprint(gated: RetentionGateModel) -> str:
    return fingerprint(gated.model, getattr(text_config(gated.model), "rope_parameters", None))


def gates_digest(gated: RetentionGateModel, adapter: str) -> str:
    """SHA-256 of an adapter's gates as they are in the model."""
    tensors = {
        f"{layer.layer_idx:06}.retention_gate.{name}": tensor
        for layer in gated.gated_layers
        for name, tensor in layer.retention_gate[adapter].state_dict().items()
    }
    if any(tensor.is_meta for tensor in tensors.values()):
        raise ValueError(
            "The gates are offloaded (accelerate's cpu_offload, disk_offload or dispatch_model), and a memory file "
            f"must say which they are: {BACK}."
        )
    return digest(sorted(tensors.items()), asdict(gated.peft_config[adapter]))


def _shares_digest(shares: Any) -> str:
    return hashlib.sha256(json.dumps(shares).encode()).hexdigest()
