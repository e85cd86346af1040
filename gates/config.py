"""What an adapter of retention gates is, apart from its weights."""

import difflib
import math
import os
from dataclasses import dataclass, field, fields

from peft import PeftConfig, TaskType
from safetensors import SafetensorError, safe_open
from transformers.activations import ACT2FN

PEFT_TYPE = "RETENTION_GATE"
GATE_TYPES = ("mlp", "linear")
WEIGHTS_NAME = "adapter_model.safetensors"


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
    gate_width: int = field(default=512, metadata={"help": "Hidden units of the mlp gate; the linear gate has none."})
    activation: str = field(
        default="silu", metadata={"help": "Activation of the mlp gate, a name transformers knows."}
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
    budget_shares: list[list[float]] | None = field(
        default=None,
        metadata={"help": "Mean retained mass in tokens, [gated layers][KV heads]: what calibrated budgets follow."},
    )
    exclude_modules: list[str] | str | None = field(
        default=None, metadata={"help": "Not used: layers_to_transform chooses the layers."}
    )
    modules_to_save: list[str] | None = field(
        default=None, metadata={"help": "Not used: the base model stays as it is."}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PEFT_TYPE
        self.task_type = self.task_type or TaskType.CAUSAL_LM
        if self.gate_type not in GATE_TYPES:
            raise ValueError(
                f"gate_type={self.gate_type!r} is not a gate: choose {' or '.join(map(repr, GATE_TYPES))}."
            )
        if self.activation not in ACT2FN:
            near = difflib.get_close_matches(str(self.activation), list(ACT2FN), n=1)
            hint = f" Did you mean {near[0]!r}?" if near else ""
            raise ValueError(f"activation={self.activation!r} is not an activation of transformers.{hint}")
        _check_integer("gate_width", self.gate_width, least=1)
        _check_integer("protected_tokens", self.protected_tokens, least=0)
        half_life = self.initial_half_life
        if isinstance(half_life, bool) or not isinstance(half_life, (int, float)) or not half_life > 0:
            raise ValueError(f"initial_half_life={half_life!r} must be a positive number of tokens, such as 2000.")
        if not math.isfinite(half_life):
            raise ValueError(f"initial_half_life={half_life!r} must be finite; 1e9 tokens is as good as for ever.")
        if self.exclude_modules is not None or self.modules_to_save is not None:
            raise ValueError(
                "Retention gates know neither exclude_modules nor modules_to_save: the base model stays frozen. "
                "Choose layers with layers_to_transform."
            )
        if isinstance(self.layers_to_transform, int) and not isinstance(self.layers_to_transform, bool):
            self.layers_to_transform = [self.layers_to_transform]
        if self.layers_to_transform is not None:
            for layer in self.layers_to_transform:
                _check_integer("layers_to_transform", layer, least=0)

    @classmethod
    def check_kwargs(cls, **kwargs):
        """Refuses keys this version does not know: weights they describe would be read wrongly."""
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
    def from_pretrained(cls, pretrained_model_name_or_path: str, subfolder: str | None = None, **kwargs):
        """Reads `adapter_config.json`; refuses a weights file beside it that is cut short or no safetensors."""
        weights = os.path.join(pretrained_model_name_or_path, subfolder or "", WEIGHTS_NAME)
        if os.path.isfile(weights):
            try:
                with safe_open(weights, framework="pt"):
                    pass
            except SafetensorError as error:
                raise ValueError(
                    f"{weights} is not a whole safetensors file ({error}): save or download the adapter again."
                ) from error
        return super().from_pretrained(pretrained_model_name_or_path, subfolder=subfolder, **kwargs)


def _check_integer(name: str, value: object, least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ValueError(f"{name}={value!r} must be an integer of at least {least}.")
