"""The frozen output head: hidden states to logits, as numbers a loss can work with."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import cast

import torch
from torch import nn

from retention_gates.gates.adapter.families import text_config
from retention_gates.gates.adapter.model import find_gated_model
from retention_gates.gates.adapter.modes import evaluating
from retention_gates.trainers.distributed.sharding import gathered, whole


@dataclass
class OutputHead:
    """logits = softcap * tanh(logit_scale * (x W^T + b) / softcap), without the tanh where softcap is None."""

    module: nn.Module
    logit_scale: float
    softcap: float | None

    @classmethod
    def from_model(cls, model: nn.Module) -> "OutputHead":
        """Reads the head of a gated model from its modules and config, and checks it against the model's own logits.

        Raises:
            ValueError: if the model does something else with its hidden states.
        """
        base = find_gated_model(model).model
        config = text_config(base)
        module = base.get_output_embeddings()
        if module is None:
            raise ValueError(f"{type(base).__name__} has no output head: load the base with AutoModelForCausalLM.")
        scale = 1.0
        if getattr(config, "logit_scale", None) is not None:
            scale *= config.logit_scale
        if getattr(config, "logits_scaling", None) is not None:
            scale /= config.logits_scaling
        head = cls(
            module=module,
            logit_scale=scale,
            softcap=getattr(config, "final_logit_softcapping", None),
        )
        head._check(model, base)
        return head

    @property
    def device(self) -> torch.device:
        return next(self.module.parameters()).device

    @contextmanager
    def weights(self) -> Iterator[tuple[torch.Tensor, torch.Tensor | None]]:
        """Weight [V, C] and bias [V], whole also where ranks hold parts of them; then every rank has to enter."""
        with gathered(self.module.parameters()):
            bias = getattr(self.module, "bias", None)
            yield whole(cast(torch.Tensor, self.module.weight)), None if bias is None else whole(bias)

    def logits(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """[..., C] -> [..., V], in fp32 after the matmul."""
        with self.weights() as (weight, bias):
            hidden_states = hidden_states.to(weight.device)
            logits = nn.functional.linear(hidden_states, weight, bias).float() * self.logit_scale
        return logits if self.softcap is None else self.softcap * torch.tanh(logits / self.softcap)

    @torch.no_grad()
    def _check(self, model: nn.Module, base: nn.Module) -> None:
        ids = torch.zeros((1, 1), dtype=torch.long, device=self.device)
        # only the head is compared, so that any hidden state will do
        with evaluating(base):
            hidden = model(input_ids=ids, use_cache=False, last_hidden_state_only=True)
            own = model(input_ids=ids, use_cache=False).logits.float()
        ours = self.logits(hidden)
        tolerance = 1e-3 if hidden.dtype == torch.float32 else 3e-2
        if not torch.allclose(ours, own.to(ours.device), rtol=tolerance, atol=tolerance * own.abs().max().item()):
            raise ValueError(
                f"{type(base).__name__} changes its logits in a way its config does not tell (largest difference "
                f"{(ours - own).abs().max().item():.3g}): distillation through this head would be wrong."
            )
