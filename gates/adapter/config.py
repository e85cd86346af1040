"""The configuration of an adapter of retention gates."""

import copy
import difflib
import os
import re
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from peft import PeftConfig, TaskType
from transformers.activations import ACT2FN

from retention_gates.gates.adapter.checks import (
    MOST_SHARE,
    check_config_size,
    check_digest,
    check_weights,
    file_digest,
    is_budget_share,
    number,
    shown,
)
from retention_gates.gates.adapter.files import CONFIG_NAME, WEIGHTS_NAME, find_file


def is_module_pattern(text: str) -> bool:
    """Whether `families.module_pattern` could have made the text."""
    return len(text) <= MOST_PATTERN and re.fullmatch(MODULE_PATTERN, text) is not None


class _Method(str):
    """A name of a method with the `value` that a member of PEFT's closed enumeration of them has."""

    @property
    def value(self) -> str:
        return str(self)


PEFT_TYPE = _Method("RETENTION_GATE")
GATE_TYPES = ("mlp", "linear", "tied_mlp")
TEXTS = ("base_model_name_or_path", "base_rounding", "revision", "peft_version", "target_modules", "weights_sha256")
# What module_pattern makes, and nothing else: no pattern out of a file is wrong, or takes long to match.
_NAME = r"(?:\w|\\\.)"  # of a module, dots escaped
_LAYERS = rf"{_NAME}+\\\.\(\d+(?:\|\d+)*\)\\\.{_NAME}*"
MODULE_PATTERN = rf"{_LAYERS}(?:\|{_LAYERS})*"
MOST_PATTERN = 100_000  # characters
MOST_LAYERS = 10_000
MOST_INTEGER = 2**31 - 1
MOST_TOKENS_ALIVE = 1e30


@dataclass
class RetentionGateConfig(PeftConfig):
    """Retention gates as a PEFT method: `get_peft_model(base, RetentionGateConfig())`.

    Holds what the weights need and no option of a run: how large the memory is and which policy evicts are arguments
    of `BoundedCache`.

    Method: TRIM-KV, "Cache What Lasts", arXiv 2512.03324.

    Raises:
        ValueError: for a value that no gate can be built from.
    """

    gate_type: str = field(default="mlp", metadata={"help": f"The gate's architecture: {' or '.join(GATE_TYPES)}."})
    gate_width: int = field(default=512, metadata={"help": "Hidden units of a gate's layers; linear has none."})
    activation: str = field(
        default="silu", metadata={"help": "Activation between a gate's layers, a name transformers knows."}
    )
    initial_half_life: float = field(
        default=2000.0, metadata={"help": "Tokens after which an untrained gate has halved a token's retention."}
    )
    protected_tokens: int = field(
        default=4, metadata={"help": "Leading tokens of each document that never decay and are never evicted."}
    )
    layers_to_transform: list[int] | None = field(
        default=None, metadata={"help": "Layer indices that get a gate, or one; None: every full-attention layer."}
    )
    target_modules: str | None = field(
        default=None, metadata={"help": "Filled in: an expression that matches the gated attention modules' names."}
    )
    gated_layers: list[int] | None = field(
        default=None, metadata={"help": "Filled in: the indices of the gated layers."}
    )
    hidden_size: int | None = field(default=None, metadata={"help": "Filled in: the base model's hidden size."})
    num_key_value_heads: int | None = field(
        default=None, metadata={"help": "Filled in: the base model's KV heads per layer."}
    )
    base_rounding: str | None = field(
        default=None,
        metadata={
            "help": "Filled in: how the base's weights were rounded in training: none, Q4_K_M, ...; None: unknown."
        },
    )
    budget_shares: list[list[float]] | None = field(
        default=None,
        metadata={"help": "Mean retained mass in tokens, [gated layers][KV heads]: what calibrated budgets follow."},
    )
    weights_sha256: str | None = field(
        default=None, metadata={"help": "Filled in: of the saved weights, and of what gives them their meaning."}
    )
    exclude_modules: list[str] | str | None = field(
        default=None, metadata={"help": "Not used: layers_to_transform chooses the layers."}
    )
    modules_to_save: list[str] | None = field(
        default=None, metadata={"help": "Not used: the base model stays as it is."}
    )

    awaits_weights = False  # True from reading the config until the weights that belong to it are loaded
    has_loaded_weights = False

    def __post_init__(self) -> None:
        for name in TEXTS:
            value = getattr(self, name)
            if value is not None and not (isinstance(value, str) and value.isprintable()):
                raise ValueError(f"{name}={shown(repr(value))} must be a text, or left out.")
        super().__post_init__()
        self.awaits_weights = self.weights_sha256 is not None  # it was read from a file
        self.peft_type = PEFT_TYPE
        self.task_type = self.task_type or TaskType.CAUSAL_LM
        if self.task_type != TaskType.CAUSAL_LM:
            raise ValueError(f"task_type={self.task_type!r}: gates are for models that write text, CAUSAL_LM.")
        if self.target_modules is not None and not is_module_pattern(self.target_modules):
            raise ValueError(
                f"target_modules={shown(self.target_modules)!r} is not of the kind that gates fill in: leave it out, "
                "and choose layers with layers_to_transform."
            )
        if self.gate_type not in GATE_TYPES:
            raise ValueError(
                f"gate_type={self.gate_type!r} is not a gate: choose {' or '.join(map(repr, GATE_TYPES))}."
            )
        if not isinstance(self.activation, str) or self.activation not in ACT2FN:
            near = difflib.get_close_matches(str(self.activation), list(ACT2FN), n=1)
            hint = f" Did you mean {near[0]!r}?" if near else ""
            raise ValueError(f"activation={self.activation!r} is not an activation of transformers.{hint}")
        _check_integer("gate_width", self.gate_width, least=1)
        _check_integer("protected_tokens", self.protected_tokens, least=0)
        half_life = self.initial_half_life
        if isinstance(half_life, bool) or not isinstance(half_life, (int, float)) or not half_life > 0:
            raise ValueError(f"initial_half_life={half_life!r} must be a positive number of tokens, such as 2000.")
        if half_life > MOST_TOKENS_ALIVE:
            raise ValueError(
                f"initial_half_life={number(half_life)} must be finite, and at most {MOST_TOKENS_ALIVE:g}; 1e9 tokens "
                "is as good as for ever."
            )
        if self.exclude_modules is not None or self.modules_to_save is not None:
            raise ValueError(
                "Retention gates know neither exclude_modules nor modules_to_save: the base model stays frozen. "
                "Choose layers with layers_to_transform."
            )
        if isinstance(self.layers_to_transform, int) and not isinstance(self.layers_to_transform, bool):
            self.layers_to_transform = [self.layers_to_transform]
        for name in ("layers_to_transform", "gated_layers"):
            layers = getattr(self, name)
            if layers is not None and not isinstance(layers, (list, tuple, range)):
                raise ValueError(f"{name}={layers!r} must be a list of layer indices, such as [0, 2].")
            if layers is not None:
                if len(layers) > MOST_LAYERS:
                    raise ValueError(f"{name} lists {len(layers)} layers; no model has more than {MOST_LAYERS}.")
                for layer in layers:
                    _check_integer(name, layer, least=0)
                setattr(self, name, list(layers))
        shares = self.budget_shares
        if shares is not None and not (isinstance(shares, list) and all(isinstance(row, list) for row in shares)):
            raise ValueError(
                f"budget_shares={shares!r} must be a list of lists, [gated layers][KV heads]: take it out of "
                "adapter_config.json and run retention-gates calibrate."
            )
        if shares is not None and not all(is_budget_share(share) for row in shares for share in row):
            raise ValueError(
                f"budget_shares must be finite numbers from 0 to {MOST_SHARE:g}: take them out of adapter_config.json "
                "and run retention-gates calibrate."
            )

    @classmethod
    def check_kwargs(cls, **kwargs: Any) -> Any:
        """Refuses another method's adapter, and keys this version does not know: it would read the weights wrongly."""
        if kwargs.get("peft_type") != PEFT_TYPE:
            raise ValueError(
                f"adapter_config.json has peft_type={kwargs.get('peft_type')!r}, where retention gates have "
                f"{PEFT_TYPE!r}: name the folder that a training run wrote, or an adapter of the Hub with gates."
            )
        known = {f.name for f in fields(cls)} | {"peft_version", "auto_mapping"}
        unknown = sorted(set(kwargs) - known)
        if unknown:
            near = {key: difflib.get_close_matches(key, sorted(known), n=1) for key in unknown}
            hints = [f"{key!r}" + (f" (nearest known: {near[key][0]!r})" if near[key] else "") for key in unknown]
            raise ValueError(
                f"adapter_config.json has keys this version of retention-gates does not know: {', '.join(hints)}. "
                "It was probably written by a newer version: pip install -U retention-gates."
            )
        return super().check_kwargs(**kwargs)

    @classmethod
    def from_json_file(cls, path_json_file: str, **kwargs: Any) -> dict[str, Any]:
        """Reads a config; refuses a file that holds no JSON object."""
        way_out = "save or download the adapter again."
        check_config_size(path_json_file)
        try:
            content = super().from_json_file(path_json_file, **kwargs)
        except ValueError as error:  # also of a number with more digits than Python reads
            raise ValueError(f"{path_json_file} is not JSON ({error}): {way_out}") from error
        except (RecursionError, TypeError) as error:  # TypeError: PEFT looks for keys in what may be a number
            raise ValueError(f"{path_json_file} holds no object of keys ({error}): {way_out}") from error
        if not isinstance(content, dict):
            raise ValueError(f"{path_json_file} holds a {type(content).__name__}, not an object of keys: {way_out}")
        return content

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str, subfolder: str | None = None, **kwargs: Any) -> Any:
        """Reads the config of a folder or of the Hub, and checks the weights beside it before a model is touched."""
        source = os.fspath(pretrained_model_name_or_path)
        hub, _, _ = cls._split_kwargs(kwargs | ({} if subfolder is None else {"subfolder": subfolder}))
        find_file(source, CONFIG_NAME, **hub)
        config = super().from_pretrained(source, subfolder=subfolder, **kwargs)
        config._check_weights(find_file(source, WEIGHTS_NAME, **hub))
        config.awaits_weights = True
        return config

    def save_pretrained(self, save_directory: str, **kwargs: Any) -> None:
        """Writes `adapter_config.json`, with the digest of the weights that lie in the folder already."""
        written = copy.copy(self)
        weights = os.path.join(save_directory, WEIGHTS_NAME)
        written.weights_sha256 = file_digest(weights, asdict(self)) if os.path.isfile(weights) else None
        super(RetentionGateConfig, written).save_pretrained(save_directory, **kwargs)

    def _check_weights(self, path: Path) -> None:
        from retention_gates.gates.adapter.gate import GATES  # which builds its gates from this config

        facts = {name: getattr(self, name) for name in ("hidden_size", "num_key_value_heads", "gated_layers")}
        missing = [name for name, fact in facts.items() if fact is None]
        if missing:
            raise ValueError(
                f"adapter_config.json lacks {', '.join(missing)}, which every saved adapter has: save or download the "
                "adapter again."
            )
        assert self.gated_layers is not None
        for name in ("hidden_size", "num_key_value_heads"):
            _check_integer(name, facts[name], least=1)
        shapes = GATES[self.gate_type].shapes(facts["hidden_size"], facts["num_key_value_heads"], self.gate_width)
        check_weights(path, shapes, len(self.gated_layers))
        check_digest(file_digest(path, asdict(self)), asdict(self))


def _check_integer(name: str, value: object, least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= MOST_INTEGER:
        raise ValueError(
            f"{name}={number(value)} must be an integer of at least {least} and at most {MOST_INTEGER}, as a Python "
            "int."
        )
