"""Checks of a model and its memory before its weights are loaded."""

from pathlib import Path

import torch
from peft import PeftModel
from torch import nn
from transformers import AutoModelForCausalLM

from retention_gates import BoundedCache
from retention_gates.checkpoints.hub import download_adapter
from retention_gates.gates.adapter.families import text_config
from retention_gates.gates.adapter.model import find_gated_model
from retention_gates.gates.adapter.placement import device_bytes
from retention_gates.recipes.loading.models import adapter_config, load_base_config
from retention_gates.recipes.serving.rows import check_rows_come_and_go

MEMORY = Path("/proc/meminfo")
SPARE = 0.08  # of a device's free memory: activations, captured steps, what torch keeps


def skeleton(name: str, adapter: str, gguf_file: str | None = None) -> PeftModel:
    """The model with its gates, without the base's weights.

    Raises:
        ValueError: for an adapter that does not go with the model.
    """
    folder = str(download_adapter(adapter))
    recorded = adapter_config(folder)
    revision = recorded.revision if name == recorded.base_model_name_or_path else None
    config = load_base_config(name, gguf_file, revision)
    with torch.device("meta"):
        base = AutoModelForCausalLM.from_config(config)
    return PeftModel.from_pretrained(base, folder)


def servable_row(model: nn.Module, memory_size: int, budgets: str | None, dtype: torch.dtype) -> int:
    """Bytes of one chat's row: keys and values in `dtype`; of each entry a score, a position and a flag.

    Raises:
        ValueError: if rows of this model with these budgets cannot come and go.
    """
    cache = BoundedCache(model, memory_size, budgets=budgets)
    check_rows_come_and_go(model, cache)
    config = text_config(find_gated_model(model).model)
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return int(cache.slots * (2 * width * dtype.itemsize + 4 + 8 + 1))


def free_bytes(device: torch.device) -> int:
    """Bytes of memory that can be had now, or, where a system does not say, that there are in all."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    if MEMORY.exists():
        lines = dict(line.split(":", 1) for line in MEMORY.read_text().splitlines())
        return 1024 * int(lines["MemAvailable"].split()[0])
    return device_bytes(device)


def check_memory(model: nn.Module, row: int, chats: int, device: torch.device, dtype: torch.dtype) -> None:
    """Raises ValueError if weights and rows don't fit into what the device has free, with how many chats would."""
    weights = sum(parameter.numel() for parameter in model.parameters()) * dtype.itemsize
    free = free_bytes(device)
    room = int(free * (1 - SPARE)) - weights
    fitting = room // row - 1  # one more row reads prompts
    if fitting >= chats:
        return
    way = f"--max-chats {fitting}, or a smaller --memory-size" if fitting > 0 else "a smaller model or --dtype"
    raise ValueError(
        f"{chats} chats of {row / 2**20:.1f} MiB beside {weights / 2**30:.2f} GiB of weights do not fit into the "
        f"{free / 2**30:.2f} GiB that {device} has free: {max(fitting, 0)} chats would. Ask for {way}."
    )


def client_name(adapter: str) -> str:
    """The name by which clients call the model by default: a name of the Hub, of a folder its last part only."""
    folder = Path(adapter)
    return folder.resolve().name if folder.exists() else adapter
