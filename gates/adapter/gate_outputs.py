"""Reads what the gates say during a forward pass."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import nn

from retention_gates.gates.adapter.modes import temporarily


@dataclass
class Recording:
    """Outputs of the gates in one forward pass, in the order of the layers."""

    layerwise: bool
    log_beta: list[torch.Tensor] = field(default_factory=list)  # [B, H, T] each, protected tokens at 0
    layer_losses: list[torch.Tensor] = field(default_factory=list)  # scalars, with layerwise=True only
    document_ids: torch.Tensor | None = None  # [B, T]


@contextmanager
def record(model: nn.Module, layerwise: bool = False) -> Iterator[Recording]:
    """Collects log_beta of every gated layer of `model` for the forward passes inside the block.

    With gradient checkpointing, gradients reach what is recorded in the non-reentrant form only.

    Args:
        layerwise: let every layer compare its own attention output with and without decay, and pass on the undecayed
            one, so that each gate learns on the teacher's activations and no gradient goes through the model.
    """
    from retention_gates.gates.adapter.model import find_gated_model  # model.py needs the layers, which need Recording

    recording = Recording(layerwise)
    layers = find_gated_model(model).gated_layers
    with temporarily(layers, recording=recording):
        yield recording
