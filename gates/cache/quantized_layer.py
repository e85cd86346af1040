"""Slots that hold keys and values in 8 bits, each entry with a scale of its own."""

import torch
from torch import nn

from retention_gates.gates.cache.saved_cache_checks import check_numbers
from retention_gates.gates.cache.slot_layer import SlotLayer
from retention_gates.gates.policies.eviction_rule import EvictionRule
from retention_gates.kernels.gate_evict import naive

SCALE_BYTES = 4  # fp32
# cache_dtype -> how a number is stored, and the largest that can be
STORED = {"int8": (torch.int8, 127.0), "fp8": (torch.float8_e4m3fn, 448.0)}


def pack(x: torch.Tensor, cache_dtype: str) -> torch.Tensor:
    """x [..., D] as bytes [..., D + 4]: numbers of 8 bits, then the fp32 scale that they are to be multiplied with.

    The largest number of an entry becomes the largest that can be stored. In one tensor of bytes, scales move with
    their entries wherever those go.
    """
    dtype, largest = STORED[cache_dtype]
    x = x.float()
    most = x.abs().amax(-1, keepdim=True)
    # an entry that 8 bits cannot hold is NaN throughout, as attention to it would be
    most = most.where(most.isfinite(), float("nan")).clamp(min=torch.finfo(torch.float32).tiny)
    scale = most / largest
    scaled = (x / scale).clamp(-largest, largest)
    numbers = scaled.round().to(dtype) if dtype == torch.int8 else scaled.to(dtype)
    return torch.cat([numbers.view(torch.uint8), scale.view(torch.uint8)], dim=-1)


def unpack(stored: torch.Tensor, cache_dtype: str, dtype: torch.dtype) -> torch.Tensor:
    """Returns the numbers that `pack` has stored, [..., D] in dtype."""
    numbers, scale = stored.split([stored.shape[-1] - SCALE_BYTES, SCALE_BYTES], dim=-1)
    scale = scale.contiguous().view(torch.float32)
    return (numbers.contiguous().view(STORED[cache_dtype][0]).float() * scale).to(dtype)


class QuantizedSlotLayer(SlotLayer):
    """A SlotLayer whose `keys` [B, N, D + 4] and `values` [B, N, Dv + 4] are bytes, as `pack` makes them.

    New tokens of a chunk attend to each other as they are and to the slots as these are stored. Attention and eviction
    run in plain torch, whatever the device.
    """

    _evict = staticmethod(naive.gate_evict)

    def __init__(self, rule: EvictionRule, owner: nn.Module, cache_dtype: str):
        super().__init__(rule, owner)
        self.cache_dtype = cache_dtype
        self.takes_gate_output = False  # which only the fused kernel does

    @property
    def entry_numbers(self) -> int:
        return super().entry_numbers - 2 * SCALE_BYTES

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        super().lazy_initialization(*(pack(x[:, :, :1], self.cache_dtype) for x in (key_states, value_states)))
        self.dtype = key_states.dtype

    def _held(self, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        keys, values = (self.read_back(stored).to(dtype) for stored in (self.keys, self.values))
        return keys, values, self.slot_positions

    def to_store(self, x: torch.Tensor) -> torch.Tensor:
        return pack(x, self.cache_dtype)

    def read_back(self, stored: torch.Tensor) -> torch.Tensor:
        """The keys or values that slots hold, [..., D]."""
        return unpack(stored, self.cache_dtype, self.dtype)

    @property
    def why_rows_stay(self) -> str | None:
        return "its entries have 8 bits"

    def check_saved(self, name: str, state: dict[str, torch.Tensor], columns: int) -> list[str]:
        problems = [
            p for key in ("keys", "values") for p in check_numbers(f"{name}.{key}", self.read_back(state[key]))
        ]
        return problems + super().check_saved(name, state, columns)
