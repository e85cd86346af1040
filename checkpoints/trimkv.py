"""Gates in the form of the method's authors (package trimkv) as adapters of ours, and the way back.

Their checkpoint is a folder with `config.json`, the base model's config and some keys more, and `trimkv_weights.pth`,
a dict of tensors. Their two gates are ours: `rg` is the mlp gate, `rg10` the tied_mlp gate, except that the bias of
the last layer is a parameter of its own there. Both read what enters the attention layer.

Source: trimkv 0.1.5 on PyPI.
"""

import json
import pickle
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from retention_gates.gates.adapter.checks import check_config_size, shown
from retention_gates.gates.adapter.config import RetentionGateConfig
from retention_gates.gates.adapter.families import module_pattern
from retention_gates.gates.adapter.files import WEIGHTS_NAME
from retention_gates.gates.adapter.gate import GATES, bias_to_half_life

THEIR_CONFIG, THEIR_WEIGHTS = "config.json", "trimkv_weights.pth"
FAMILIES = ("qwen3", "qwen2", "llama", "phi3")  # whose decoder layers are model.layers.{i}
OURS = "base_model.model.model.layers.{layer}.self_attn.retention_gate.{name}"
THEIRS = "model.layers.{layer}.self_attn.retention_gate.{name}"
RUNTIME_FACTS = ("memory_size", "global_capacity", "max_seq_len", "base_loss", "retention_weight")  # for the card


@dataclass(frozen=True)
class Form:
    """One of their gates: its name in config.json, ours, and their parameter names -> ours."""

    name: str
    gate_type: str
    parameters: dict[str, str]


_HIDDEN = {"linear1.weight": "hidden.weight", "linear1.bias": "hidden.bias"}
_MIDDLE = {"linear2.weight": "middle.weight", "linear2.bias": "middle.bias"}
FORMS = (
    Form("rg", "mlp", {**_HIDDEN, "linear2.weight": "output.weight", "bias": "output.bias"}),
    Form("rg10", "tied_mlp", {**_HIDDEN, **_MIDDLE, "linear3.weight": "output.weight", "bias": "output.bias"}),
)


def import_gates(config_file: Path, weights_file: Path, target: Path, base_model: str | None = None) -> dict[str, Any]:
    """Writes an adapter of ours into the folder `target`; gives their config.

    The adapter protects no tokens, as theirs don't, and has no calibrated shares.

    Args:
        base_model: the base model's name, if it is not the one in their config.

    Raises:
        ValueError: for a gate, a family, keys or shapes that are not known.
    """
    theirs = read_config(config_file)
    form = _form_of(theirs)
    sizes = {
        "hidden_size": _size(theirs, "hidden_size"),
        "num_key_value_heads": _size(theirs, "num_key_value_heads", "num_attention_heads"),
        "gate_width": _size(theirs, "retention_gate_intermediate_size"),
    }
    layers = range(_size(theirs, "num_hidden_layers"))
    base_model = base_model or theirs.get("base_model")
    if not isinstance(base_model, str) or not base_model:
        raise ValueError(f"{config_file} names no base_model: name it with --base-model.")
    options: dict[str, Any] = dict(sizes)
    if theirs.get("retention_gate_bias_init") is not None:
        options["initial_half_life"] = bias_to_half_life(_bias(theirs))
    config = RetentionGateConfig(
        base_model_name_or_path=base_model,
        gate_type=form.gate_type,
        activation=theirs.get("hidden_act"),  # type: ignore[arg-type]
        protected_tokens=0,
        gated_layers=list(layers),
        target_modules=module_pattern({layer: f"model.layers.{layer}.self_attn" for layer in layers}),
        inference_mode=True,
        **options,
    )
    shapes = GATES[form.gate_type].shapes(sizes["hidden_size"], sizes["num_key_value_heads"], sizes["gate_width"])
    tensors = _read_weights(weights_file)
    _check(tensors, form, layers, shapes)
    ours = {
        OURS.format(layer=layer, name=name): tensors[THEIRS.format(layer=layer, name=their_name)].float().clone()
        for layer in layers
        for their_name, name in form.parameters.items()
    }
    save_file(ours, target / WEIGHTS_NAME, metadata={"format": "pt"})
    config.save_pretrained(str(target))
    return theirs


def export_gates(
    adapter: Path,
    base_config: dict[str, Any],
    target: Path,
    *,
    base_model: str,
    memory_size: int,
    global_capacity: bool = False,
    drop_protected_tokens: bool = False,
) -> None:
    """Writes an adapter of ours into the folder `target` in their form.

    Args:
        base_config: what the base model's config.json says.
        memory_size: entries per KV head, which their runtime reads from config.json.
        global_capacity: whether the capacity loss was that of all heads together; ours is of each head.
        drop_protected_tokens: export gates that were trained with protected tokens, which their runtime would evict.

    Raises:
        ValueError: for what their form cannot express.
    """
    config = RetentionGateConfig.from_pretrained(str(adapter))
    form = next((form for form in FORMS if form.gate_type == config.gate_type), None)
    if form is None:
        kinds = " and ".join(repr(form.gate_type) for form in FORMS)
        raise ValueError(f"Their form has no {config.gate_type!r} gate; it has {kinds}: train one of these.")
    _check_family(base_config)
    wanted = {
        "hidden_size": config.hidden_size,
        "num_key_value_heads": config.num_key_value_heads,
        "hidden_act": config.activation,
    }
    base = {"num_key_value_heads": base_config.get("num_attention_heads"), **base_config}
    for name, value in wanted.items():
        if base.get(name) != value:
            raise ValueError(
                f"Their gates take {name} from the base model's config, {base.get(name)!r}, and the adapter has "
                f"{value!r}: it cannot be expressed there."
            )
    layers = range(_size(base_config, "num_hidden_layers"))
    if config.gated_layers != list(layers):
        raise ValueError(
            f"Their form has a gate in each of the {len(layers)} layers, and the adapter in {config.gated_layers}: it "
            "cannot be expressed there."
        )
    if config.protected_tokens and not drop_protected_tokens:
        raise ValueError(
            f"The gates were trained with {config.protected_tokens} protected tokens, whose decay they have not "
            "learnt, and their runtime protects none: the first tokens may be evicted, which hurts. Export all the "
            "same with --drop-protected-tokens, or train with gate.protected_tokens=0."
        )
    tensors = load_file(adapter / WEIGHTS_NAME)
    theirs = {
        THEIRS.format(layer=layer, name=their_name): tensors[OURS.format(layer=layer, name=name)].float()
        for layer in layers
        for their_name, name in form.parameters.items()
    }
    torch.save(theirs, target / THEIR_WEIGHTS)
    facts = {
        "base_model": base_model,
        "retention_gate": form.name,
        "retention_gate_intermediate_size": config.gate_width,
        "memory_size": memory_size,
        "global_capacity": global_capacity,
        "trainable_params": "retention_gate",
    }
    text = json.dumps(_for_older_transformers(base_config) | facts, indent=2)
    (target / THEIR_CONFIG).write_text(text + "\n", encoding="utf-8")


def import_card(theirs: dict[str, Any], source: str) -> str:
    """README.md of an imported adapter: where it is from, and what its config says of its use."""
    names = ("retention_gate", *RUNTIME_FACTS)
    facts = [f"| {name} | {theirs[name]} |" for name in names if theirs.get(name) is not None]
    return "\n".join(
        [
            f"# {Path(source).name}, converted",
            "",
            "Retention gates of the method's authors (TRIM-KV, arXiv 2512.03324; DBTrimKV, arXiv 2605.09649), "
            f"converted by `retention-gates convert` from `{_portable(source)}`. What its config.json says:",
            "",
            "| | |",
            "|---|---|",
            *facts,
            "",
            "The weights are the same numbers in fp32. No token is protected, as in the authors' runtime. Budgets are "
            "uniform until `retention-gates calibrate` has measured shares.",
            "",
        ]
    )


def _portable(source: str) -> str:
    return Path(source).name if Path(source).is_dir() else source


def read_config(path: Path) -> dict[str, Any]:
    """A config.json, if it is an object of keys of a sensible size."""
    check_config_size(path)
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not JSON ({type(error).__name__}): download it again.") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds a {type(content).__name__}, not an object of keys.")
    return content


def _form_of(theirs: dict[str, Any]) -> Form:
    _check_family(theirs)
    kind = theirs.get("retention_gate")
    for form in FORMS:
        if form.name == kind:
            return form
    known = ", ".join(form.name for form in FORMS)
    raise ValueError(f"config.json has retention_gate={kind!r}, of which nothing is known here; known are {known}.")


def _check_family(config: dict[str, Any]) -> None:
    if config.get("model_type") not in FAMILIES:
        raise ValueError(
            f"The base model's family is {config.get('model_type')!r}; their form is known of {', '.join(FAMILIES)}."
        )


def _size(config: dict[str, Any], *names: str) -> int:
    value = next((config[name] for name in names if config.get(name) is not None), None)
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"config.json has {names[0]}={value!r}, where an integer of at least 1 is needed.")
    return value


def _bias(config: dict[str, Any]) -> float:
    bias = config["retention_gate_bias_init"]
    if isinstance(bias, bool) or not isinstance(bias, (int, float)) or not abs(bias) < 500:
        raise ValueError(f"config.json has retention_gate_bias_init={bias!r}, where a number like 18.0 is expected.")
    return float(bias)


def _read_weights(path: Path) -> dict[str, torch.Tensor]:
    try:
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError, OSError) as error:
        raise ValueError(
            f"{path} holds something else than tensors, or is not whole ({str(error).splitlines()[0]}). Nothing of it "
            "was run. Download it again."
        ) from error
    if not isinstance(content, dict) or not all(
        isinstance(k, str) and isinstance(t, torch.Tensor) for k, t in content.items()
    ):
        raise ValueError(f"{path} is no dict of tensors by name.")
    return content


def _check(tensors: dict[str, torch.Tensor], form: Form, layers: range, shapes: dict[str, list[int]]) -> None:
    expected = {
        THEIRS.format(layer=layer, name=their_name): shapes[name]
        for layer in layers
        for their_name, name in form.parameters.items()
    }
    problems = [f"missing {key}" for key in expected.keys() - tensors.keys()]
    problems += [f"unexpected {shown(key)}" for key in tensors.keys() - expected.keys()]
    for key in expected.keys() & tensors.keys():
        tensor = tensors[key]
        if list(tensor.shape) != expected[key]:
            problems.append(f"{key} has shape {list(tensor.shape)}, not {expected[key]}")
        elif tensor.dtype not in (torch.float32, torch.bfloat16, torch.float16):
            problems.append(f"{key} is {tensor.dtype}, not floating point of 32 or 16 bits")
        elif not tensor.isfinite().all():
            problems.append(f"{key} has NaN or infinite values")
    shared = GATES[form.gate_type].shared
    for their_name, name in form.parameters.items():
        if name.split(".")[0] in shared and not problems:
            first, *others = (tensors[THEIRS.format(layer=layer, name=their_name)] for layer in layers)
            if not all(torch.equal(first, other) for other in others):
                problems.append(f"{their_name} differs between layers, where {form.name} has one for all")
    if problems:
        more = f"; and {len(problems) - 5} more" if len(problems) > 5 else ""
        raise ValueError(
            f"The weights are not those of {form.name} gates in {len(layers)} layers: "
            f"{'; '.join(sorted(problems)[:5])}{more}."
        )


def _for_older_transformers(config: dict[str, Any]) -> dict[str, Any]:
    """The base's config with RoPE under the names that transformers 4, which their package needs, reads."""
    rope = config.get("rope_parameters")
    if "rope_theta" in config or not isinstance(rope, dict):
        return config
    scaling = {name: value for name, value in rope.items() if name != "rope_theta"}
    named = {"rope_theta": rope["rope_theta"]} if "rope_theta" in rope else {}
    return config | named | ({} if scaling.get("rope_type", "default") == "default" else {"rope_scaling": scaling})
