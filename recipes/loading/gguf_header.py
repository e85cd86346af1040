"""Reads what a GGUF file says of positions and transformers' loader silently leaves out."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from transformers import PreTrainedConfig

# tensors with a factor for each rotary frequency: Llama 3.1 and later, LongRoPE
FREQUENCY_FACTORS = ("rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight")
SCALING_NUMBERS = {  # name in the file -> in a config's rope_parameters
    "factor": "factor",
    "original_context_length": "original_max_position_embeddings",
}


class GgufFacts(NamedTuple):
    """Facts of a file beside its positions."""

    rounding: str | None  # Q4_K_M; None if it does not say
    has_tokenizer: bool


def check_gguf(path: str | Path, load_config: Callable[[], PreTrainedConfig]) -> GgufFacts:
    """Returns what the file says; raises ValueError if the model would attend to other positions than that.

    Gates would be trained, and texts written, at wrong angles or across the edge of a window.

    Args:
        load_config: gives the config that transformers makes of the file; called where it matters, it takes seconds.
    """
    import gguf

    try:
        reader = gguf.GGUFReader(path)
        said = {name: field.contents() for name, field in reader.fields.items() if _is_of_positions(name)}
        architecture = reader.fields["general.architecture"].contents()
        file_type = reader.fields.get("general.file_type")
        names = {kind.value: kind.name.removeprefix("MOSTLY_").removeprefix("ALL_") for kind in gguf.LlamaFileType}
        facts = GgufFacts(
            rounding=None if file_type is None else names.get(file_type.contents()),
            has_tokenizer="tokenizer.ggml.model" in reader.fields,
        )
        factors = [t.name for t in reader.tensors if t.name in FREQUENCY_FACTORS and bool((t.data != 1).any())]
    except (ValueError, KeyError, IndexError, OverflowError, TypeError) as error:
        raise ValueError(f"{path} is no whole GGUF file ({error!r}): download it again.") from error
    of_model = {name.removeprefix(f"{architecture}."): value for name, value in said.items()}
    scaling = {name.removeprefix("rope.scaling."): value for name, value in of_model.items() if ".scaling." in name}
    window = of_model.get("attention.sliding_window")
    # a factor of 1 scales nothing, and 0 is written where none is meant; LongRoPE may state none
    is_scaled = bool(scaling) and scaling.get("type", "linear") != "none" and scaling.get("factor") not in (0, 1)
    is_windowed = window not in (None, 0) and _least(window) < _least(of_model.get("context_length", 2**62))
    if not (is_scaled or is_windowed or factors):
        return facts
    config = load_config().get_text_config(decoder=True)
    left_out = [f"the tensor {name}" for name in factors]
    if is_scaled and not any(_is_same(scaling, rope) for rope in _rotary_embeddings(config)):
        left_out.append(", ".join(f"{architecture}.rope.scaling.{name}={scaling[name]!r}" for name in sorted(scaling)))
    if is_windowed and getattr(config, "sliding_window", None) != window:
        left_out.append(f"{architecture}.attention.sliding_window={window!r}")
    if left_out:
        raise ValueError(
            f"{path} has {' and '.join(left_out)}, which transformers leaves out when it loads a GGUF file, so that "
            "the model would attend to other positions than it was trained for: name its original weights "
            "(safetensors) instead, or a GGUF file of a model without."
        )
    return facts


def _is_of_positions(name: str) -> bool:
    return ".rope.scaling." in name or name.endswith((".attention.sliding_window", ".context_length"))


def _least(value: Any) -> int:
    """The number, or the least of those for each layer."""
    return min(value) if isinstance(value, list) else value


def _rotary_embeddings(config: PreTrainedConfig) -> Iterator[dict[str, Any]]:
    """The config's rope_parameters; one for each kind of layer where those differ."""
    parameters = getattr(config, "rope_parameters", None) or {}
    if "rope_type" in parameters:
        yield parameters
    yield from (value for value in parameters.values() if isinstance(value, dict))


def _is_same(scaling: dict[str, Any], rope: dict[str, Any]) -> bool:
    """Whether transformers' rotary embedding is scaled as the file says."""
    pairs = [(value, rope.get(SCALING_NUMBERS[name])) for name, value in scaling.items() if name in SCALING_NUMBERS]
    return str(rope.get("rope_type")) == scaling.get("type", "linear") and all(one == other for one, other in pairs)
