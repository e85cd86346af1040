"""Where a base model and its gates lie, and what there is room for: what cannot be is refused."""

import os
from collections.abc import Callable

import torch
from torch import nn

from retention_gates.compat import has_offload_hook

BACK = (
    "accelerate.hooks.remove_hook_from_submodules(model.get_base_model()) brings them back if there is room, or load "
    "the base with a device_map that has it, and add the gates afterwards"
)


def check_placement(model: nn.Module, *, loads_weights: bool) -> None:
    """Raises ValueError for a base model that lies where gates cannot follow."""
    if (getattr(model, "tp_size", None) or 1) > 1:
        raise ValueError(
            f"{type(model).__name__} is tensor parallel over {model.tp_size} processes (tp_plan), each of which has "
            "some of the heads, while gates, budgets and caches are of all heads: load it without tp_plan and, if one "
            'GPU is too small, with device_map="auto".'
        )
    if loads_weights and "disk" in getattr(model, "hf_device_map", {}).values():
        raise ValueError(
            f"Parts of {type(model).__name__} are offloaded to the disk (hf_device_map), and PEFT cannot load gates "
            "beside those: give device_map more memory (max_memory=), or a smaller or quantised base model."
        )


def device_of(model: nn.Module) -> torch.device:
    """The device of the first weights that are not offloaded; accelerate's hooks move what they are called with."""
    return next((p.device for p in model.parameters() if not p.is_meta), torch.device("cpu"))


def check_weights_are_there(model: nn.Module) -> None:
    """Raises ValueError for weights on the meta device that no hook of accelerate brings where they are needed."""
    missing = next((name for name, p in model.named_parameters() if p.is_meta), None)
    if missing is not None and not any(has_offload_hook(module) for module in model.modules()):
        raise ValueError(
            f"{missing} is on the meta device, which holds no numbers, and nothing brings them: load the model with "
            "from_pretrained, without torch.device('meta') or accelerate.init_empty_weights."
        )


def check_trainable_placement(model: nn.Module, gates: dict[str, nn.Parameter], ends: dict[str, nn.Module]) -> None:
    """Raises ValueError for offloaded weights that training would read outside of their modules' calls.

    Args:
        model: the base model.
        gates: parameters that learn, by what an error calls them.
        ends: embeddings and lm_head, by what an error calls them.
    """
    check_weights_are_there(model)
    offloaded = [name for name, parameter in gates.items() if parameter.is_meta]
    offloaded += [name for name, module in ends.items() if any(p.is_meta for p in module.parameters())]
    if not offloaded and not hasattr(model, "hf_device_map"):  # the whole was offloaded after it was loaded
        offloaded = [name for name, parameter in model.named_parameters() if parameter.is_meta]
    if offloaded:
        raise ValueError(
            f"{offloaded[0]} is offloaded (accelerate's cpu_offload, disk_offload or dispatch_model) and there during "
            f"a forward pass only, so that nothing would be trained: {BACK}."
        )


def check_gradient_arrives(gate: nn.Module, layer: int, gradient: torch.Tensor) -> None:
    """Raises ValueError in a backward pass whose gradient of the gate is lost.

    Accelerate's hooks put other parameters in the place of offloaded ones for the forward pass. Those get the
    gradient, while the ones that an optimiser holds stay without, and a training loop changes nothing.
    """
    if any(parameter.is_meta for parameter in gate.parameters()):
        raise ValueError(
            f"The gate of layer {layer} is offloaded (accelerate's cpu_offload, disk_offload or dispatch_model), and "
            f"its gradient would be lost, so that nothing would be trained: {BACK}. Then make the optimizer anew."
        )


def device_bytes(device: torch.device) -> int:
    """Bytes of memory that a device has in all, used or not."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def check_room(name: str, value: int, bytes_of: Callable[[int], int], device: torch.device, why: str) -> None:
    """Raises ValueError for a number that takes more memory than a device has in all, before anything is allocated.

    Args:
        name: of the option, with value as the user gave it.
        bytes_of: bytes that a value takes at least; more for a larger one.
        why: what takes them, such as "for the rows of all chats".
    """
    wanted, there = bytes_of(value), device_bytes(device)
    if wanted <= there:
        return
    least, most = 0, value  # the largest value that fits lies from least to below most
    while most - least > 1:
        middle = (least + most) // 2
        least, most = (middle, most) if bytes_of(middle) <= there else (least, middle)
    way_out = f"choose at most {least:,}" if least else "not even 1 fits, so that a smaller model is needed"
    raise ValueError(
        f"{name}={value} takes {wanted // 2**30:,} GiB {why}, and {device} has {there // 2**30:,} GiB: {way_out}."
    )
