"""Ways of PEFT and of transformers with adapters that would lose gates, or save what cannot be loaded."""

import inspect
import warnings
from typing import Any

import torch
from peft import PeftConfig, PeftModel

from retention_gates.gates.adapter.placement import BACK


class GatesOnly(dict[str, torch.Tensor]):
    """The weights of an adapter, to which PEFT's `update` adds nothing: it could not be loaded with anything else.

    PEFT would add the embeddings and the lm_head of a base whose vocabulary was resized, or those of a LoRA's
    modules_to_save.

    Raises:
        ValueError: if they are offloaded, so that there is nothing to save.
    """

    def __init__(self, weights: dict[str, torch.Tensor]):
        super().__init__(weights)
        if any(tensor.is_meta for tensor in weights.values()):
            raise ValueError(
                "The gates are offloaded (accelerate's cpu_offload, disk_offload or dispatch_model), and there is "
                f"nothing to save: {BACK}."
            )

    def update(self, *others: Any, **more: Any) -> None:
        """Leaves out what is no gate, and warns of it."""
        left_out = sorted(dict(*others, **more))
        if left_out:
            warnings.warn(
                f"Only gates are saved, without {', '.join(left_out[:3])}{' ...' * (len(left_out) > 3)}, which belong "
                "to the base model. Save a base that was changed itself, with save_pretrained before get_peft_model "
                "or after model.unload(), and load the gates on it.",
                stacklevel=2,
            )


def is_loading_files() -> bool:
    """Whether PeftModel.load_adapter is at work, rather than a caller who sets weights of their own.

    PEFT calls a tuner in the same way for both: for set_peft_model_state_dict, which is there to overwrite, and for a
    second adapter under a name that is taken, whose config would not be read.
    """
    frame = inspect.currentframe()
    while frame is not None and frame.f_code is not PeftModel.load_adapter.__code__:
        frame = frame.f_back
    return frame is not None


def refuse_injection(peft_config: Any) -> None:
    """Raises ValueError where layers are put into a model without the PeftModel that drives them.

    transformers' load_adapter would go on and leave the gates as they were drawn at random, without a word.
    """
    if isinstance(peft_config, PeftConfig):  # a PeftModel passes a dict of them
        raise ValueError(
            "Retention gates need PEFT's wrapper around the base model, which base.load_adapter, base.add_adapter, "
            "AutoModelForCausalLM.from_pretrained(adapter) and inject_adapter_in_model leave out: "
            "PeftModel.from_pretrained(base, adapter) loads trained gates, or AutoPeftModelForCausalLM.from_pretrained"
            "(adapter) with the base that the adapter names; get_peft_model(base, RetentionGateConfig()) adds "
            "untrained ones."
        )
