"""A whole sequence in one forward pass, seen as a bounded cache would have shown it token by token."""

import torch
from torch import nn

from retention_gates.gates.cache import EvictingCache
from retention_gates.gates.eviction_rule import EvictionRule
from retention_gates.gates.masked_attention import masked_attention
from retention_gates.gates.ruled_layer import RuledLayer
from retention_gates.kernels.eviction_times import eviction_times


class SimulatedLayer(RuledLayer):
    """Knows beforehand when each token will go, because scores are set when tokens are created.

    After the forward pass `eviction_times` [B, H, T] says at which step each token was no longer seen.
    """

    eviction_times: torch.Tensor | None = None

    def __init__(self, rule: EvictionRule, owner: nn.Module):
        super().__init__(rule, owner)
        self.seen = 0

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        self.dtype, self.device, self.batch_size = key_states.dtype, key_states.device, key_states.shape[0]
        self.is_initialized = True

    @torch.no_grad()
    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args, **kwargs
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if not self.is_empty:
            raise ValueError(
                "A SimulatedCache reads a whole sequence in one forward pass, and this one has read its own: call "
                "cache.reset() before the next. To generate, use BoundedCache."
            )
        log_beta, valid = self.take_staged()  # the whole sequence is new
        self.lazy_initialization(key_states, value_states)
        tokens = key_states.shape[2]
        offset = torch.arange(tokens, device=self.device).expand(self.batch_size, tokens)
        if valid is not None:
            offset = offset - (valid.cumsum(1) == 0).sum(1, keepdim=True)
        self.eviction_times = eviction_times(
            self.rule.score(log_beta, key_states, offset).contiguous(),
            torch.tensor(self.rule.budgets, device=self.device),
            linear_in_age=self.rule.policy.linear_in_age,
            buffer_size=self.rule.buffer_size,
            protected=self.rule.is_protected(offset),
            recent=self.rule.recent(self.device),
            valid=valid,
        )
        self.seen = tokens
        return key_states, value_states

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
        assert self.eviction_times is not None
        step = torch.arange(self.seen, device=self.device)
        causal = step <= step[:, None]  # [T, T]
        outputs = []
        for row, times in enumerate(self.eviction_times):  # one at a time: a mask is H * T * T bytes
            one = slice(row, row + 1)
            visible = causal & (step[:, None] < times[:, None, :])  # [H, T, T]
            outputs.append(
                masked_attention(
                    query[one], key[one], value[one], visible[None], scale=scale, softcap=softcap, sinks=sinks
                )
            )
        self.is_empty = self.is_attending = False
        return torch.cat(outputs)

    def get_seq_length(self) -> int:
        return self.seen

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.seen + query_length, 0

    def holds(self, span: tuple[int, int]) -> bool:
        """Pinning a sequence that has been read would change nothing any more."""
        return self.is_empty

    def reset(self) -> None:
        super().reset()
        self.seen, self.eviction_times = 0, None


class SimulatedCache(EvictingCache):
    """What a BoundedCache with the same arguments would do over a sequence fed token by token, in one forward pass.

    For measuring: what is held at each step is exactly what the step-by-step decode holds, given the same scores;
    outputs are equal up to rounding, and nothing is bounded. Pass it as past_key_values to one forward pass over the
    whole rows.
    """

    layer_class = SimulatedLayer
