"""Sequence parallelism: groups of ranks that share rows, asked for as Accelerate's users ask for it.

Accelerate has DeepSpeed carry out the sp_size of a `parallelism_config`, which cannot be here:
gates/attention/sequence_parallel.py says why. So it is taken out of the arguments, and to
Accelerate these are ranks like any others, which average gradients.
"""

import os
from contextlib import AbstractContextManager

from accelerate import Accelerator, ParallelismConfig
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from transformers import PreTrainedConfig

from retention_gates.gates.adapter.families import full_attention_layers, key_value_heads, text_config
from retention_gates.gates.adapter.modes import temporarily
from retention_gates.gates.attention.sequence_parallel import RowGroup

GIVEN, OTHERS = ("sp_size", "dp_replicate_size"), ("cp_size", "tp_size", "dp_shard_size")
IN_USE = "ACCELERATE_USE_PARALLELISM_CONFIG"


def ranks_per_row(given: ParallelismConfig | dict[str, int] | None, ranks: int) -> int:
    """P, over how many of the ranks a row is split, as parallelism_config or the launcher's environment say.

    Raises:
        ValueError: if the ranks cannot be divided into such groups, or anything else is to be split.
    """
    if isinstance(given, dict):  # as a YAML file says it
        wrong = [f"{name}: {value!r}" for name, value in given.items() if name not in GIVEN or type(value) is not int]
        if wrong:
            raise ValueError(
                f"parallelism_config={{{', '.join(wrong)}}} must hold whole numbers for {' and '.join(GIVEN)} alone, "
                "as in {sp_size: 2}."
            )
        given = ParallelismConfig(**given)
    if given is not None and not isinstance(given, ParallelismConfig):
        raise ValueError(f"parallelism_config={given!r} must be a mapping or Accelerate's, as in {{sp_size: 2}}.")
    config = given or ParallelismConfig()  # what is not given it reads from the environment
    split = [f"{name}={getattr(config, name)}" for name in OTHERS if getattr(config, name) > 1]
    if split:
        raise ValueError(
            f"parallelism_config with {', '.join(split)} would split rows in a ring, or layers: leave it out. Long "
            "rows fit with sp_size and gradient_checkpointing_kwargs={offload: true}, large bases with FSDP2 or "
            "ZeRO-3."
        )
    size: int = config.sp_size
    if ranks % size or config.dp_replicate_size not in (1, ranks // size):
        raise ValueError(
            f"sp_size={size} with dp_replicate_size={config.dp_replicate_size} does not divide {ranks} ranks into "
            f"groups: sp_size can be {_listed(ranks)}, dp_replicate_size follows from it. Start other ranks with "
            "--num_processes, or leave parallelism_config out."
        )
    if IN_USE in os.environ:
        os.environ[IN_USE] = "false"  # Accelerate would read the rest again
    return size


def check_heads(config: PreTrainedConfig, size: int) -> None:
    """Raises ValueError unless every rank of a group gets as many heads; `config` is that of the decoder."""
    heads = {"query heads": config.num_attention_heads, "KV heads": key_value_heads(config)}
    for name, count in heads.items():
        if count % size:
            raise ValueError(
                f"sp_size={size} does not divide the {count} {name} of this model, which are spread over the ranks in "
                f"attention: sp_size can be {_listed(*heads.values())}."
            )


def check_row_length(length: int, size: int) -> None:
    """Raises ValueError unless every rank of a group gets as many tokens of a row."""
    if length % size:
        raise ValueError(
            f"sp_size={size} does not divide a row of {length} tokens: pack rows (data.row_length) of "
            f"{length - length % size or size} or {length - length % size + size}."
        )


def check_layers(model: nn.Module) -> None:
    """Raises ValueError for a base whose tokens meet anywhere but in the attention that exchanges them."""
    full, count = full_attention_layers(model), text_config(model).num_hidden_layers
    if len(full) != count:
        raise ValueError(
            f"sp_size splits rows, and {count - len(full)} of the {count} layers of {type(model).__name__} are no "
            "full attention (sliding windows, linear attention): a rank would see the past of its own tokens only. "
            "Leave sp_size out."
        )
    if any(hasattr(model.get_submodule(name), "sinks") for name in full.values()):
        raise ValueError(
            f"sp_size spreads heads over ranks, and {type(model).__name__} has sinks of all heads in every layer: "
            "leave sp_size out."
        )


class RowGroups:
    """All ranks in groups of `size` that follow one another, as Accelerate orders them; size 1: there are none."""

    def __init__(self, accelerator: Accelerator, size: int):
        self.accelerator = accelerator
        self.mesh: DeviceMesh | None = None
        self.own: RowGroup | None = None
        if size > 1:
            shape = (accelerator.num_processes // size, size)
            # to Accelerate's data loaders ranks that differ along "tp" alone get the same rows
            self.mesh = init_device_mesh(accelerator.device.type, shape, mesh_dim_names=("dp_replicate", "tp"))
            self.own = RowGroup(self.mesh.get_group("tp"))

    def dealt_rows(self) -> AbstractContextManager[None]:
        """Data loaders that are prepared inside the block deal their batches to groups, not to ranks."""
        state = self.accelerator.state
        return temporarily([state], device_mesh=self.mesh or state.device_mesh)


def _listed(*counts: int) -> str:
    return " or ".join(str(size) for size in range(1, min(counts) + 1) if not any(count % size for count in counts))
