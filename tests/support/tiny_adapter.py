"""What the commands read: a tiny base model with its tokenizer, texts, and an adapter with gates that evict."""

from dataclasses import dataclass
from pathlib import Path

import torch
from peft import get_peft_model
from tiny_run import make_model, make_texts
from transformers import AutoModelForCausalLM

from retention_gates import RetentionGateConfig, find_gated_model


@dataclass
class Files:
    """Folders; `arguments` names the last two on a command line, the base being named by the adapter."""

    model: Path
    texts: Path
    adapter: Path

    @property
    def arguments(self) -> list[str]:
        return ["--adapter", str(self.adapter), "--text", str(self.texts)]


def make_files(folder: Path) -> Files:
    files = Files(make_model(folder / "model"), make_texts(folder / "texts"), folder / "adapter")
    make_adapter(files.model, files.adapter)
    return files


def make_adapter(base: Path, folder: Path) -> None:
    """Gates of half-lives from a fraction of a token to some hundred tokens."""
    config = RetentionGateConfig(gate_width=16, initial_half_life=20.0)
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), config)
    torch.manual_seed(1)
    for layer in find_gated_model(model).gated_layers:
        for parameter in layer.active_gate.parameters():
            if parameter.ndim == 2:
                torch.nn.init.normal_(parameter, std=0.5)
    model.save_pretrained(folder, save_embedding_layers=False)
