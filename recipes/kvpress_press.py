"""The gates as a press of kvpress, to be compared there with its other methods under its own rule.

    from kvpress import KVPressTextGenerationPipeline
    from retention_gates.recipes.kvpress_press import RetentionPress

    press = RetentionPress(compression_ratio=0.5, adapter="user/adapter")
    pipeline("kv-press-text-generation", model=...)(context, question=question, press=press)

kvpress has its own environment: `pip install kvpress` brings the transformers that it needs, and of this package only
the gates are used there. `tests/support/check_kvpress_press.py` compares what it keeps with a BoundedCache.
"""

import re
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import hf_hub_download
from safetensors.torch import load_file
from torch import nn

from retention_gates.gates.adapter.config import WEIGHTS_NAME, RetentionGateConfig
from retention_gates.gates.adapter.gate import GATES, RetentionGate

INSTALLED = find_spec("kvpress") is not None
if INSTALLED:
    from kvpress import ScorerPress  # type: ignore[import-not-found,import-untyped,unused-ignore]
else:  # everything but a press can be had without it
    ScorerPress = object

WEIGHT = re.compile(r"\.layers\.(\d+)\..*retention_gate\.(.+)")


@dataclass
class RetentionPress(ScorerPress):
    """Keeps, in every head, the entries that have decayed least, as a BoundedCache does after a prompt.

    The score is age * log_beta at the prompt's end. Protected tokens come first. The share that is kept is the same
    for all heads; `AdaKVPress(RetentionPress(...))` divides it between the heads of a layer.

    Method: TRIM-KV, "Cache What Lasts", arXiv 2512.03324.

    Args:
        adapter: trained gates, a folder or a Hub name.
    """

    adapter: str = ""
    gates: dict[int, RetentionGate] = field(init=False, repr=False, default_factory=dict)  # by layer
    protected_tokens: int = field(init=False, default=0)

    def __post_init__(self) -> None:
        if not INSTALLED:
            raise ValueError("RetentionPress needs the package kvpress: pip install kvpress.")
        super().__post_init__()
        if not self.adapter:
            raise ValueError("RetentionPress needs trained gates: give adapter=, a folder or a Hub name.")
        config = RetentionGateConfig.from_pretrained(self.adapter)
        assert isinstance(config, RetentionGateConfig)
        assert config.hidden_size is not None and config.num_key_value_heads is not None
        self.protected_tokens = config.protected_tokens
        weights: dict[int, dict[str, torch.Tensor]] = {}
        for name, tensor in load_file(_weights_file(self.adapter)).items():
            found = WEIGHT.search(name)
            if found is None:
                raise ValueError(f"The adapter {self.adapter} has a weight that is of no gate: {name!r}.")
            weights.setdefault(int(found[1]), {})[found[2]] = tensor
        for layer, state in weights.items():
            gate = GATES[config.gate_type](config.hidden_size, config.num_key_value_heads, config)
            gate.load_state_dict(state)
            self.gates[layer] = gate.eval()

    def post_init_from_model(self, model: Any) -> None:
        layers = model.model.language_model.layers if hasattr(model.model, "language_model") else model.model.layers
        missing = [layer for layer in self.gates if layer >= len(layers)]
        if missing:
            raise ValueError(
                f"The adapter {self.adapter} has gates for layer {missing[0]} and the model {len(layers)} layers: "
                "load the base model that it was trained on."
            )

    @torch.no_grad()
    def score(
        self,
        module: nn.Module,
        hidden_states: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        attentions: torch.Tensor | None,
        kwargs: dict[str, Any],
    ) -> torch.Tensor:
        """Scores [B, H, T] of all tokens; the largest are kept."""
        layer, tokens = int(module.layer_idx), keys.shape[2]  # type: ignore[arg-type]
        if layer not in self.gates:
            raise ValueError(f"The adapter {self.adapter} has no gate for layer {layer}: leave this layer out.")
        if hidden_states.shape[1] != tokens:
            raise ValueError(
                f"The layer holds {tokens} tokens and gives the hidden states of {hidden_states.shape[1]}: gates look "
                "at every token when it is created. Use RetentionPress for prompts, not inside a DecodingPress."
            )
        log_beta = self.gates[layer].to(hidden_states.device)(hidden_states)
        age = torch.arange(tokens - 1, -1, -1, device=log_beta.device)
        score = age * log_beta
        score[..., : self.protected_tokens] = torch.inf
        return score


def _weights_file(adapter: str) -> str:
    folder = Path(adapter)
    if folder.is_dir():
        return str(folder / WEIGHTS_NAME)

    return hf_hub_download(adapter, WEIGHTS_NAME)
