"""The gate: hidden states in, log of a token's retention coefficient out."""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import nn
from transformers.activations import ACT2FN

from retention_gates.gates.adapter.config import RetentionGateConfig
from retention_gates.kernels.gate_evict import GateOutput


class GateLinear(nn.Linear):
    """A linear layer that reads what has fewer bits than its weights as if it had as many."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x.to(self.weight.dtype), self.weight, self.bias)


class RetentionGate(nn.Module):
    """`log_beta = logsigmoid(logits(x))`, always computed and stored in fp32.

    bf16 weights would lose every update (steps are below their spacing), so a cast of the whole model moves the gate
    to the new device but leaves its dtype alone.

    Source: TRIM-KV, arXiv 2512.03324, section 3.
    """

    shared: tuple[str, ...] = ()  # modules that the gates of all layers have in common

    @staticmethod
    def shapes(hidden_size: int, heads: int, width: int) -> dict[str, list[int]]:
        """Parameter name -> shape, as a gate of these sizes has them, without building one."""
        raise NotImplementedError

    output: nn.Linear

    def features(self, x: torch.Tensor) -> torch.Tensor:  # [B, T, C] -> fp32 [B, T, W], what the output layer reads
        raise NotImplementedError

    def logits(self, x: torch.Tensor) -> torch.Tensor:  # [B, T, C] -> [B, T, H]
        return self.output(self.features(x))

    @property
    def can_be_finished_elsewhere(self) -> bool:
        """Whether the output layer can be read; ZeRO-3 and accelerate show what is elsewhere in its call only."""
        return self.output.weight.ndim == 2 and not self.output.weight.is_meta

    def unfinished(self, hidden_states: torch.Tensor) -> GateOutput:
        """All but the output layer for one token per row [B, 1, C]: a cache's kernel can do the rest."""
        with torch.autocast(hidden_states.device.type, enabled=False):
            features = self.features(hidden_states)[:, 0]
        weight, bias = (x.to(features.device) for x in (self.output.weight, self.output.bias))  # of a shared layer
        return GateOutput(features, weight, bias)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """hidden states [B, T, C] -> log_beta [B, H, T], fp32, below 0."""
        with torch.autocast(hidden_states.device.type, enabled=False):
            return F.logsigmoid(self.logits(hidden_states)).transpose(1, 2)

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> "RetentionGate":
        def keep_fp32(tensor: torch.Tensor) -> torch.Tensor:
            out = fn(tensor)
            return out if out.dtype == tensor.dtype else tensor.to(out.device)

        return super()._apply(keep_fp32, recurse)


class MLPGate(RetentionGate):
    """One hidden layer; the standard gate."""

    def __init__(self, hidden_size: int, heads: int, config: RetentionGateConfig):
        super().__init__()
        self.hidden = GateLinear(hidden_size, config.gate_width, dtype=torch.float32)
        self.output = nn.Linear(config.gate_width, heads, dtype=torch.float32)
        self.activation = ACT2FN[config.activation]
        _initialise(self.hidden, 0.0)
        _initialise(self.output, half_life_to_bias(config.initial_half_life))

    @staticmethod
    def shapes(hidden_size: int, heads: int, width: int) -> dict[str, list[int]]:
        return _linear("hidden", width, hidden_size) | _linear("output", heads, width)

    def features(self, x: torch.Tensor) -> torch.Tensor:
        return self.activation(self.hidden(x))


class TiedMLPGate(RetentionGate):
    """Two hidden layers; all layers of the model share one output layer, so that their logits are on one scale.

    Source: DBTrimKV, arXiv 2605.09649, whose released gates have this form.
    """

    shared = ("output",)

    def __init__(self, hidden_size: int, heads: int, config: RetentionGateConfig):
        super().__init__()
        self.hidden = GateLinear(hidden_size, config.gate_width, dtype=torch.float32)
        self.middle = nn.Linear(config.gate_width, config.gate_width, dtype=torch.float32)
        self.output = nn.Linear(config.gate_width, heads, dtype=torch.float32)
        self.activation = ACT2FN[config.activation]
        _initialise(self.hidden, 0.0)
        _initialise(self.middle, 0.0)
        _initialise(self.output, half_life_to_bias(config.initial_half_life))

    @staticmethod
    def shapes(hidden_size: int, heads: int, width: int) -> dict[str, list[int]]:
        return (
            _linear("hidden", width, hidden_size) | _linear("middle", width, width) | _linear("output", heads, width)
        )

    def features(self, x: torch.Tensor) -> torch.Tensor:
        return self.activation(self.middle(self.activation(self.hidden(x))))

    def logits(self, x: torch.Tensor) -> torch.Tensor:
        x = self.features(x)
        output = self.output  # on the device of one layer, where the layers are on several
        if output.weight.is_meta:  # offloaded: accelerate brings it when it is called
            return output(x)
        return F.linear(x, output.weight.to(x.device), output.bias.to(x.device))


class LinearGate(RetentionGate):
    """No hidden layer: smaller, and a little worse at equal steps."""

    def __init__(self, hidden_size: int, heads: int, config: RetentionGateConfig):
        super().__init__()
        self.output = nn.Linear(hidden_size, heads, dtype=torch.float32)
        _initialise(self.output, half_life_to_bias(config.initial_half_life))

    @staticmethod
    def shapes(hidden_size: int, heads: int, width: int) -> dict[str, list[int]]:
        return _linear("output", heads, hidden_size)

    def features(self, x: torch.Tensor) -> torch.Tensor:
        return x.float()


GATES: dict[str, type[RetentionGate]] = {"mlp": MLPGate, "linear": LinearGate, "tied_mlp": TiedMLPGate}


def gate_bytes(config: RetentionGateConfig, width: int) -> int:
    """Bytes of the gates of all layers that a config names, if their layers were so wide; of shared modules once."""
    assert (
        config.hidden_size is not None and config.num_key_value_heads is not None and config.gated_layers is not None
    )
    kind = GATES[config.gate_type]
    shapes = kind.shapes(config.hidden_size, config.num_key_value_heads, width)
    copies = {name: 1 if name.split(".")[0] in kind.shared else len(config.gated_layers) for name in shapes}
    return sum(4 * copies[name] * math.prod(shape) for name, shape in shapes.items())


def half_life_to_bias(half_life: float) -> float:
    """The bias b whose retention halves after `half_life` tokens: half_life = ln 2 * exp(b)."""
    return math.log(half_life / math.log(2.0))


def bias_to_half_life(bias: float) -> float:
    """Tokens after which a gate with the bias b halves retention, the way back of `half_life_to_bias`."""
    return math.log(2.0) * math.exp(bias)


def half_life(log_beta: torch.Tensor) -> torch.Tensor:
    """Tokens until half of a token's retention is left; infinite where log_beta is 0."""
    return -math.log(2.0) / log_beta


def _initialise(layer: nn.Linear, bias: float) -> None:
    nn.init.normal_(layer.weight, std=0.02)
    nn.init.constant_(layer.bias, bias)


def _linear(name: str, outputs: int, inputs: int) -> dict[str, list[int]]:
    return {f"{name}.weight": [outputs, inputs], f"{name}.bias": [outputs]}
