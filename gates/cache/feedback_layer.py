"""The cache of fixed size for policies that look at what is held and at the attention that it received."""

import torch
from torch import nn

from retention_gates.gates.cache import feedback
from retention_gates.gates.cache.slot_layer import STATE, Chunk, SlotLayer
from retention_gates.gates.policies import FeedbackPolicy, Held
from retention_gates.gates.policies.eviction_rule import EvictionRule
from retention_gates.kernels.gate_evict import GateOutput, enter_token, place_chunk, slot_table
from retention_gates.kernels.ragged_decode_attention import entry_weights, ragged_decode_attention
from retention_gates.kernels.softmax import Softmax

QUERIES = 128  # of a chunk whose weights exist at a time, HQ x QUERIES x (slots + chunk) fp32 numbers per row


class FeedbackSlotLayer(SlotLayer):
    """Slots that carry a policy's state beside them. The victims are chosen after attention, and go at once.

    Beside the state of `SlotLayer`, of which `score` is only inf or 0, protected or not, and `pending` stays empty:
    state [B, N, K] fp32 and head_state [B, H, P] fp32, the policy's own; and, of a policy that gives priorities once
    in several steps, the last priority [B, N] fp32, inf for entries that entered since.
    """

    state: torch.Tensor
    head_state: torch.Tensor
    priority: torch.Tensor
    is_due = True  # whether the step that runs gives new priorities

    def __init__(self, rule: EvictionRule, owner: nn.Module):
        super().__init__(rule, owner)
        self.takes_gate_output = False
        self.row_state = (*STATE, "state", "head_state") + (("priority",) if self.rule.interval > 1 else ())
        self.settled: tuple[EvictionRule, int, float] | None = None

    @property
    def policy(self) -> FeedbackPolicy:
        assert isinstance(self.rule.policy, FeedbackPolicy)
        return self.rule.policy

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        super().lazy_initialization(key_states, value_states)
        self.has_head_state = False  # its size is known when there are queries
        shape = (self.batch_size, self.slots)
        with torch.inference_mode(False):
            self.state = torch.zeros(*shape, self.policy.state_width(key_states.shape[-1]), device=self.device)
            self.head_state = torch.zeros(self.batch_size, len(self.rule.budgets), 0, device=self.device)
            self.priority = torch.full(shape if self.rule.interval > 1 else (0, 0), float("inf"), device=self.device)

    def _attend_token(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        log_beta: torch.Tensor | GateOutput,
        padding_mask: torch.Tensor | None,
        softmax: Softmax,
    ) -> torch.Tensor:
        chunk = self._placed(log_beta, key, value, padding_mask)
        self._enter_chunk(chunk)
        return self._attend_and_evict(query, chunk, softmax)

    @torch.no_grad()
    def _enter_chunk(self, chunk: Chunk) -> None:
        """Writes a chunk of one token into free slots."""
        new, barred = chunk.new, _barred(chunk)
        entering = [
            (self.keys, new.key.squeeze(2)),
            (self.values, new.value.squeeze(2)),
            (self.score, barred.squeeze(2)),
            (self.state, self.policy.initial_state(new).squeeze(2)),
        ]
        if self.rule.interval > 1:
            entering.append((self.priority, torch.full_like(barred[:, :, 0], float("inf"))))
        enter_token(entering, self.slot_positions, chunk.positions[:, 0], self.head_offsets)

    def _prepare(self, query: torch.Tensor, scale: float) -> None:
        """Allocates what depends on the queries, at the first, and what the rule says of them, when it changes."""
        if not self.has_head_state:
            heads = len(self.rule.budgets)
            size = self.policy.head_state_size(query.shape[3], query.shape[1] // heads)
            with torch.inference_mode(False):
                self.head_state = torch.zeros(self.batch_size, heads, size, device=self.device)
            self.has_head_state = True
        if self.settled != (self.rule, self.batch_size, scale):
            self.settled = self.rule, self.batch_size, scale
            self.setting = self.rule.setting(self.batch_size, scale, self.device)
            self.floor = None if self.rule.floor is None else torch.tensor(self.rule.floor, device=self.device)

    def _attend_and_evict(self, query: torch.Tensor, chunk: Chunk, softmax: Softmax) -> torch.Tensor:
        """One token, which has entered, attends to what is held; then victims are chosen and go."""
        self._prepare(query, softmax.scale)
        policy, table = self.policy, slot_table(self.head_offsets, self.device)
        received = torch.empty_like(self.score) if policy.needs_attention else None
        output = ragged_decode_attention(
            query, *self._held(query.dtype), self.head_offsets, softmax, received=received
        )
        held = Held(
            table.held(self.slot_positions),
            table.by_head(self.state),
            self.head_state,
            query,
            chunk.positions >= 0,
            self.seen - 1,
            self.start,
            lambda name: table.by_head(getattr(self, name)),
            self.setting,
        )
        if policy.observe is not None:
            weights = None if received is None else table.by_head(received)[:, :, None]
            feedback.observe(policy, held, weights, chunk.is_padded)
        interval = self.rule.interval
        if self.is_due:
            priority = feedback.priorities(policy, held)
            if interval > 1:
                self.priority.copy_(table.ragged(priority))
        else:
            priority = table.by_head(self.priority)
        most = self.rule.most_victims
        victims = self._victims(priority, held, table.by_head(self.score), most)
        if policy.merge is not None:
            keys, values = policy.merge(held, victims, most)
            self.keys.copy_(table.ragged(keys))
            self.values.copy_(table.ragged(values))
        self.state.copy_(table.ragged(held.state))
        self.slot_positions.masked_fill_(table.ragged(victims), -1)
        return output

    def _attend_chunk(self, query: torch.Tensor, chunk: Chunk, softmax: Softmax) -> torch.Tensor:
        self._prepare(query, softmax.scale)
        output = self._attend_causally(query, chunk, softmax)
        key, value, positions = chunk.new.key, chunk.new.value, chunk.positions
        barred, state = _barred(chunk), self.policy.initial_state(chunk.new)
        policy, table = self.policy, slot_table(self.head_offsets, self.device)
        tokens = key.shape[2]

        def with_chunk(slots: torch.Tensor, new: torch.Tensor) -> torch.Tensor:  # [B, H, S + T, ...]
            return torch.cat([table.by_head(slots), new], dim=2)

        everyone = with_chunk(self.slot_positions, positions[:, None].expand(-1, len(table.sizes), -1))
        everyone[:, :, :-tokens].masked_fill_(~table.exists, -1)
        held = Held(
            everyone,
            with_chunk(self.state, state),
            self.head_state,
            query,
            positions >= 0,
            self.seen - 1,
            self.start,
            lambda name: with_chunk(getattr(self, name), {"keys": key, "values": value}[name]),
            self.setting,
        )
        for first in range(0, tokens, QUERIES) if policy.observe is not None else ():
            block = slice(first, min(first + QUERIES, tokens))
            held.query, held.is_real = query[:, :, block], positions[:, block] >= 0
            held.step = self.seen - tokens + block.stop - 1
            weights = None
            if policy.needs_attention:
                visible = held.exists[:, :, None] & (everyone[:, :, None] <= held.query_steps[:, None])
                weights = entry_weights(held.query, held.keys, visible, softmax)
            feedback.observe(policy, held, weights, chunk.is_padded)
        priority = feedback.priorities(policy, held)
        most = everyone.shape[2]
        victims = self._victims(priority, held, with_chunk(self.score, barred), most)
        if policy.merge is not None:
            keys, values = (x.to(key.dtype) for x in policy.merge(held, victims, most))
            self.keys.copy_(table.ragged(keys[:, :, :-tokens]))
            self.values.copy_(table.ragged(values[:, :, :-tokens]))
            key, value = keys[:, :, -tokens:], values[:, :, -tokens:]
        self.state.copy_(table.ragged(held.state[:, :, :-tokens]))
        entering = [(self.keys, key), (self.values, value), (self.score, barred)]
        entering.append((self.state, held.state[:, :, -tokens:]))
        if self.rule.interval > 1:
            self.priority.copy_(table.ragged(priority[:, :, :-tokens]))
            entering.append((self.priority, priority[:, :, -tokens:]))
        place_chunk(entering, self.slot_positions, positions, victims, self.head_offsets)
        return output

    def _victims(self, priority: torch.Tensor, held: Held, barred: torch.Tensor, most: int) -> torch.Tensor:
        rule = self.rule
        surplus = feedback.surplus(held.exists.sum(2), held.budgets, rule.buffer_size, rule.is_shared)
        stays = feedback.stays(held, barred, self.recent)
        return feedback.victims(priority, held, stays, surplus, most, self.floor, rule.reserved)

    def reset(self) -> None:
        super().reset()
        if self.is_initialized:
            self.head_state.zero_()

    @property
    def why_not_captured(self) -> str | None:
        if self.policy.reads_back:
            return f"policy={self.policy.name!r} waits for the device"
        return None

    def count(self, tokens: int) -> None:
        super().count(tokens)
        self.is_due = self.columns % self.rule.interval == 0

    @property
    def step_kind(self) -> bool | None:
        """Whether the next step gives new priorities, of a policy whose priorities hold for several steps."""
        return (self.columns + 1) % self.rule.interval == 0 if self.rule.interval > 1 else None

    @property
    def why_rows_keep_columns(self) -> str | None:
        return f"policy={self.policy.name!r} keeps numbers that may count from the first column"

    @property
    def step_period(self) -> int:
        return self.rule.interval


def _barred(chunk: Chunk) -> torch.Tensor:
    """fp32 [B, H, T], inf for protected tokens and 0 for others."""
    return torch.zeros_like(chunk.new.log_beta).masked_fill(chunk.is_protected, float("inf"))
