"""What a gated attention layer asks of a cache layer that bounds its memory."""

from abc import abstractmethod
from typing import Any

import torch
from torch import nn
from transformers.cache_utils import CacheLayerMixin

from retention_gates.kernels.gate_evict import GateOutput


class GatedCacheLayer(CacheLayerMixin):
    """A cache layer that decides itself which entries a query sees.

    Every forward pass of a layer makes three calls, in this order: the wrapper around the attention module calls
    `stage`, transformers' `Cache.update` calls `update`, and the registered attention function calls `attend`.
    """

    finishes_gate = False  # whether `stage` takes one token's gate without its output layer

    @abstractmethod
    def stage(self, module: nn.Module, log_beta: torch.Tensor | GateOutput, padding_mask: torch.Tensor | None) -> None:
        """Takes what `update` does not get.

        Args:
            module: the wrapper that calls; a cache belongs to one model.
            log_beta: [B, H, T] fp32, as the gate gave it, or of one token what is left of the gate to compute.
            padding_mask: [B, S] bool, False for padding, S >= T; its last T columns are the new tokens, those before
                them the past. None if all are real.
        """

    @abstractmethod
    def attend(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        *,
        scale: float,
        softcap: float | None = None,
        sinks: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Plain attention of the new queries [B, HQ, T, D] over what is held and what is new -> [B, HQ, T, Dv].

        Args:
            key, value: what `update` returned: the new entries, [B, H, T, D].
            sinks: an extra logit per query head [HQ] in the softmax's denominator.
        """


def storage_bytes(layer: Any) -> int:
    """Bytes of all tensors that are attributes of a layer of transformers, or values of a dict that is one."""
    held = [value for value in vars(layer).values() if not isinstance(value, dict)]
    held += [value for states in vars(layer).values() if isinstance(states, dict) for value in states.values()]
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage() for t in held if isinstance(t, torch.Tensor)}
    return sum(storage.nbytes() for storage in storages.values())
