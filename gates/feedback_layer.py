"""The cache of fixed size for policies that look at what is held and at the attention that it received."""

import torch

from retention_gates.gates import feedback
from retention_gates.gates.policies import FeedbackPolicy, Held, NewTokens
from retention_gates.gates.slot_layer import STATE, SlotLayer
from retention_gates.kernels.gate_evict import enter_token, place_chunk, slot_table
from retention_gates.kernels.slot_attention import entry_weights, slot_attention

QUERIES = 128  # of a chunk whose weights exist at a time, HQ x QUERIES x (slots + chunk) fp32 numbers per row


class FeedbackSlotLayer(SlotLayer):
    """Slots that carry a policy's state beside them. The victims are chosen after attention, and go at once.

    Beside the state of `SlotLayer`, of which `score` is only inf or 0, protected or not, and `pending` stays empty:
    state [B, N, K] fp32 and head_state [B, H, P] fp32, the policy's own.
    """

    row_state = (*STATE, "state", "head_state")
    state: torch.Tensor
    head_state: torch.Tensor

    @property
    def policy(self) -> FeedbackPolicy:
        assert isinstance(self.rule.policy, FeedbackPolicy)
        return self.rule.policy

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        super().lazy_initialization(key_states, value_states)
        width = self.policy.state_width(key_states.shape[-1])
        with torch.inference_mode(False):
            self.state = torch.zeros(self.batch_size, self.slots, width, device=self.device)
            self.head_state = torch.zeros(self.batch_size, len(self.rule.budgets), 0, device=self.device)

    def _take_in(self, new: NewTokens, positions: torch.Tensor, is_protected: torch.Tensor, is_padded: bool) -> None:
        barred = torch.zeros_like(new.log_beta).masked_fill(is_protected, float("inf"))
        state = self.policy.initial_state(new)
        if positions.shape[1] == 1:
            new_of = ((self.keys, new.key), (self.values, new.value), (self.score, barred), (self.state, state))
            entering = [(held, of_token.squeeze(2)) for held, of_token in new_of]
            enter_token(entering, self.slot_positions, positions[:, 0], self.head_offsets)
            self.token = positions >= 0, is_padded
        else:
            self.chunk = barred, state, positions, is_padded

    def _attend_token(
        self, query: torch.Tensor, scale: float, softcap: float | None, sinks: torch.Tensor | None
    ) -> torch.Tensor:
        table = slot_table(self.head_offsets, self.device)
        received = None if self.policy.observe is None else torch.empty_like(self.score)
        output = slot_attention(
            query,
            self.keys,
            self.values,
            self.slot_positions,
            self.head_offsets,
            scale=scale,
            softcap=softcap,
            sinks=sinks,
            received=received,
        )
        is_real, is_padded = self.token
        held = Held(
            table.by_head(self.slot_positions).masked_fill(~table.exists, -1),
            table.by_head(self.state),
            self.head_state,
            query,
            is_real,
            self.seen - 1,
            self.start,
            lambda name: table.by_head(getattr(self, name)),
        )
        if received is not None:
            feedback.observe(self.policy, held, table.by_head(received)[:, :, None], is_padded)
            self.state.copy_(table.ragged(held.state))
        full = held.exists.sum(2) == table.sizes
        buffer_size = self.rule.buffer_size
        barred = table.by_head(self.score)
        victims = feedback.victims(self.policy, held, barred, self.recent, full * buffer_size, buffer_size)
        self.slot_positions.masked_fill_(table.ragged(victims), -1)
        return output

    def _attend_and_cut(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        scale: float,
        softcap: float | None,
        sinks: torch.Tensor | None,
    ) -> torch.Tensor:
        barred, state, positions, is_padded = self.chunk
        output = self._attend_chunk(query, key, value, positions, is_padded, scale, softcap, sinks)
        table = slot_table(self.head_offsets, self.device)
        tokens = key.shape[2]

        def with_chunk(slots: torch.Tensor, chunk: torch.Tensor) -> torch.Tensor:  # [B, H, S + T, ...]
            return torch.cat([table.by_head(slots), chunk], dim=2)

        everyone = with_chunk(self.slot_positions, positions[:, None].expand(-1, len(table.sizes), -1))
        everyone[:, :, :-tokens].masked_fill_(~table.exists, -1)
        held = Held(
            everyone,
            with_chunk(self.state, state),
            self.head_state,
            query[:, :, :0],
            positions[:, :0] >= 0,
            self.seen - 1,
            self.start,
            lambda name: with_chunk(getattr(self, name), {"keys": key, "values": value}[name]),
        )
        for first in range(0, tokens, QUERIES) if self.policy.observe else ():
            block = slice(first, min(first + QUERIES, tokens))
            held.query, held.is_real = query[:, :, block], positions[:, block] >= 0
            held.step = self.seen - tokens + block.stop - 1
            visible = held.exists[:, :, None] & (everyone[:, :, None] <= held.query_steps[:, None])
            weights = entry_weights(held.query, held.keys, visible, scale=scale, softcap=softcap, sinks=sinks)
            feedback.observe(self.policy, held, weights, is_padded)
        count = held.exists.sum(2)
        surplus = (count - (table.sizes - self.rule.buffer_size)).where(count >= table.sizes, 0)
        victims = feedback.victims(
            self.policy, held, with_chunk(self.score, barred), self.recent, surplus, everyone.shape[2]
        )
        self.state.copy_(table.ragged(held.state[:, :, :-tokens]))
        entering = (
            (self.keys, key),
            (self.values, value),
            (self.score, barred),
            (self.state, held.state[:, :, -tokens:]),
        )
        place_chunk(entering, self.slot_positions, positions, victims, self.head_offsets)
        return output

    def reset(self) -> None:
        super().reset()
        if self.is_initialized:
            self.head_state.zero_()
