"""One layer's cache of fixed size: a ragged row of slots that new tokens overwrite in place."""

from collections.abc import Callable
from itertools import accumulate
from typing import Any, ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from retention_gates.gates.attention.cache_layer import EvictingLayer
from retention_gates.gates.attention.chunked import attend_chunk
from retention_gates.gates.cache.saved_cache_checks import check_slots
from retention_gates.gates.policies import NewTokens, ScoredPolicy
from retention_gates.gates.policies.eviction_rule import EvictionRule, Span
from retention_gates.kernels.gate_evict import GateOutput, SlotState, chunk_evict, drop_padding, gate_evict, slot_table
from retention_gates.kernels.ragged_decode_attention import LONGEST_RUN, Run, ragged_decode_attention
from retention_gates.kernels.softmax import Softmax

STATE = ("keys", "values", "score", "slot_positions", "pending", "start")  # one row per sequence of the batch


class Chunk(NamedTuple):
    """The new tokens of one pass and where they stand."""

    new: NewTokens
    positions: torch.Tensor  # int64 [B, T], -1 for padding
    is_protected: torch.Tensor  # bool [B, 1, T]
    is_padded: bool  # whether there may be padding among them


class SlotLayer(EvictingLayer):
    """Keeps each KV head's budget of entries and never moves one: a new token overwrites an evicted one.

    Head h owns slots head_offsets[h]:head_offsets[h + 1] of N, its budget + buffer_size. State, allocated once, at the
    first token: keys [B, N, D]; values [B, N, Dv]; score [B, N] fp32, inf for protected entries; slot_positions [B, N]
    int64, the column of the sequence, -1 for empty; pending [B, N], evicted after the last step and overwritten next;
    seen [], columns so far; start [B], the column of the first real token. With fused kernels, a token is one launch
    that writes it and marks the next victims, and two that attend.
    """

    row_state: tuple[str, ...] = STATE
    keys: torch.Tensor
    values: torch.Tensor
    score: torch.Tensor
    slot_positions: torch.Tensor
    pending: torch.Tensor
    start: torch.Tensor
    seen: torch.Tensor
    _evict: ClassVar[Callable[..., None]] = staticmethod(gate_evict)

    def __init__(self, rule: EvictionRule, owner: nn.Module):
        super().__init__(rule, owner)
        self.head_offsets = self._offsets()
        self.first_column = 0  # padding before it was never read
        self.takes_gate_output = isinstance(rule.policy, ScoredPolicy) and rule.policy.is_log_beta

    def _offsets(self) -> tuple[int, ...]:
        return tuple(accumulate(self.rule.sizes, initial=0))

    @property
    def slots(self) -> int:
        """Entries there is room for, all KV heads of one row together."""
        return self.head_offsets[-1]

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        self.dtype, self.device = key_states.dtype, key_states.device
        self.batch_size = key_states.shape[0]
        shape = (self.batch_size, self.slots)
        with torch.inference_mode(False):  # a cache begun in inference mode can then be used outside of it too
            self.keys = torch.zeros(*shape, key_states.shape[-1], dtype=self.dtype, device=self.device)
            self.values = torch.zeros(*shape, value_states.shape[-1], dtype=self.dtype, device=self.device)
            self.score = torch.zeros(shape, dtype=torch.float32, device=self.device)
            self.slot_positions = torch.full(shape, -1, dtype=torch.int64, device=self.device)
            self.pending = torch.zeros(shape, dtype=torch.bool, device=self.device)
            self.start = torch.full((self.batch_size,), self.first_column, dtype=torch.int64, device=self.device)
            self.seen = torch.full((), self.first_column, dtype=torch.int64, device=self.device)
            self._read_rule()
        self.is_initialized = True

    def _read_rule(self) -> None:
        """The rule as tensors on the device."""
        self.recent = self.rule.recent(self.device)
        self.protected = torch.tensor(self.rule.protected, dtype=torch.int64, device=self.device).view(-1, 2)

    def attend(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        log_beta: torch.Tensor | GateOutput,
        padding_mask: torch.Tensor | None,
        softmax: Softmax,
    ) -> torch.Tensor:
        if not self.is_initialized:
            self.lazy_initialization(key, value)
        if key.shape[2] == 1:
            output = self._attend_token(query, key, value, log_beta, padding_mask, softmax)
        else:
            chunk = self._placed(log_beta, key, value, padding_mask)
            output = self._attend_chunk(query, chunk, softmax)
        self.is_empty = self.is_attending = False
        return output

    def _attend_token(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        log_beta: torch.Tensor | GateOutput,
        padding_mask: torch.Tensor | None,
        softmax: Softmax,
    ) -> torch.Tensor:
        """One token enters, the next victims are marked, and it attends to what is held."""
        self._enter(log_beta, key, value, padding_mask)
        return ragged_decode_attention(query, *self._held(query.dtype), self.head_offsets, softmax)

    @torch.no_grad()
    def _enter(
        self,
        log_beta: torch.Tensor | GateOutput,
        key: torch.Tensor,
        value: torch.Tensor,
        padding_mask: torch.Tensor | None,
    ) -> None:
        """Runs without a synchronisation with the device."""
        policy = self.rule.policy
        assert isinstance(policy, ScoredPolicy)
        if policy.is_log_beta:
            score = log_beta if isinstance(log_beta, GateOutput) else log_beta[:, :, 0]
        else:
            assert isinstance(log_beta, torch.Tensor)
            offset = self.seen - self.start
            if padding_mask is not None:  # a row begins later if this token is padding
                offset = offset - (~padding_mask[:, -1] & (offset == 0)).long()
            score = policy.score(self.rule.new_tokens(log_beta, key, value, offset[:, None]))[:, :, 0]
        self._evict(
            self.slot_state,
            self.to_store(key),
            self.to_store(value),
            score,
            self.head_offsets,
            linear_in_age=policy.linear_in_age,
            buffer_size=self.rule.buffer_size,
            recent=self.recent,
            protected=self.protected,
            padding_mask=padding_mask,
        )

    @torch.no_grad()
    def _placed(
        self,
        log_beta: torch.Tensor | GateOutput,
        key: torch.Tensor,
        value: torch.Tensor,
        padding_mask: torch.Tensor | None,
    ) -> Chunk:
        """The new tokens and where they stand; their columns count as seen from here on."""
        assert isinstance(log_beta, torch.Tensor)
        tokens = key.shape[2]
        valid = None if padding_mask is None else padding_mask[:, -tokens:]
        if padding_mask is not None and not self.is_empty:
            drop_padding(self.slot_positions, padding_mask[:, :-tokens])
        columns = (self.seen + torch.arange(tokens, device=self.device)).expand(self.batch_size, tokens)
        positions = columns
        if valid is not None:
            leading = (valid.cumsum(1) == 0).sum(1)
            self.start += leading.where(self.start == self.seen, 0)  # rows that have not begun yet
            positions = columns.where(valid, -1)
        offset = columns - self.start[:, None]
        if tokens > 1:
            self.slot_positions.masked_fill_(self.pending, -1)
            self.pending.zero_()
        self.seen += tokens
        new = self.rule.new_tokens(log_beta, key, value, offset)
        is_padded = valid is not None and (tokens == 1 or not bool(valid.all()))
        return Chunk(new, positions, self.rule.is_protected(offset)[:, None], is_padded)

    def _attend_chunk(self, query: torch.Tensor, chunk: Chunk, softmax: Softmax) -> torch.Tensor:
        """Several tokens attend to what is held and to each other; then all are cut to the budgets."""
        output = self._attend_causally(query, chunk, softmax)
        new, policy = chunk.new, self.rule.policy
        assert isinstance(policy, ScoredPolicy)
        with torch.no_grad():
            score = policy.score(new).masked_fill(chunk.is_protected, float("inf"))  # [B, H, T]
        chunk_evict(
            self.slot_state,
            self.to_store(new.key),
            self.to_store(new.value),
            score,
            chunk.positions,
            self.seen - 1,
            self.head_offsets,
            linear_in_age=policy.linear_in_age,
            buffer_size=self.rule.buffer_size,
            recent=self.recent,
        )
        return output

    def _attend_causally(self, query: torch.Tensor, chunk: Chunk, softmax: Softmax) -> torch.Tensor:
        """Each token attends to all held entries, and to the chunk up to itself."""
        key, value, positions = chunk.new.key, chunk.new.value, chunk.positions
        if self.is_empty and not chunk.is_padded and softmax.is_plain:
            # what transformers does without a cache, so that a prompt gives what it gives there
            is_grouped = query.shape[1] > key.shape[1]
            return F.scaled_dot_product_attention(
                query, key, value, is_causal=True, scale=softmax.scale, enable_gqa=is_grouped
            )
        held, run = self._held(query.dtype), Run(key, value, positions)
        if key.shape[2] <= LONGEST_RUN:
            return ragged_decode_attention(query, *held, self.head_offsets, softmax, run=run)
        slots = None if self.is_empty else held
        return attend_chunk(query, slots, run, self.head_offsets, softmax, is_padded=chunk.is_padded)

    def _held(self, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Keys, values and positions of the slots, as attention in this dtype reads them."""
        return self.keys, self.values, self.slot_positions

    @property
    def slot_state(self) -> SlotState:
        return SlotState(self.keys, self.values, self.score, self.slot_positions, self.pending, self.start, self.seen)

    def to_store(self, x: torch.Tensor) -> torch.Tensor:
        """Keys or values [..., D] as the slots hold them."""
        return x

    @property
    def constants(self) -> list[Any]:
        return [slot_table(self.head_offsets, self.device)]

    @property
    def why_rows_stay(self) -> str | None:
        return None

    def check_saved(self, name: str, state: dict[str, torch.Tensor], columns: int) -> list[str]:
        return check_slots(name, state, self.head_offsets, columns)

    def restore(self, state: dict[str, torch.Tensor], columns: int) -> None:
        """Takes over the tensors of `row_state`, of any number of rows, as after so many columns read in one pass."""
        for name, tensor in state.items():
            setattr(self, name, tensor)
        self.batch_size = len(self.start)
        self.seen.fill_(columns)
        self.columns, self.passes = columns, 1
        self.is_empty = self.is_attending = False

    @property
    def entry_numbers(self) -> int:
        """Numbers of an entry's key and value together."""
        return self.keys.shape[-1] + self.values.shape[-1]

    def copy_rows(self, rows: torch.Tensor, other: "SlotLayer", other_rows: torch.Tensor) -> None:
        """Overwrites rows by another layer's, as if both layers had read their last token at the same step.

        What this layer has read of other rows stays as it is. Nothing is allocated and nothing asked of the device.
        """
        ahead = (other.seen - self.seen).clamp(min=0)  # columns are counted from 0, so the other's must fit
        self.slot_positions += ahead.where(self.slot_positions >= 0, 0)
        self.start += ahead
        self.seen += ahead
        self.columns = max(self.columns, other.columns)
        behind = self.seen - other.seen
        for name in self.row_state:
            taken = getattr(other, name).index_select(0, other_rows)
            if name == "slot_positions":
                taken += behind.where(taken >= 0, 0)
            elif name == "start":
                taken += behind
            getattr(self, name).index_copy_(0, rows, taken)
        self.is_empty = False

    def share_rows(self, other: "SlotLayer", count: int) -> None:
        """Becomes the first rows of another layer like this one, in its memory, its counter of columns included."""
        self.dtype, self.device, self.batch_size = other.dtype, other.device, count
        with torch.inference_mode(False):
            for name in self.row_state:
                setattr(self, name, getattr(other, name)[:count])
        self.seen, self.recent, self.protected = other.seen, other.recent, other.protected
        self.columns, self.is_empty, self.is_initialized = other.columns, other.is_empty, True

    def begin_at(self, column: int) -> None:
        assert self.is_empty
        self.columns = self.first_column = column
        if self.is_initialized:
            self.start.fill_(column)
            self.seen.fill_(column)

    def positions(self, head: int) -> torch.Tensor:
        """Positions that a KV head holds between two steps, [B, S] ascending, -1 where it holds fewer than S."""
        self.check_head(head)
        room = self.rule.sizes[head] - 1
        if not self.is_initialized:
            return torch.full((0, room), -1)
        nobody = torch.iinfo(torch.int64).max
        own = slice(self.head_offsets[head], self.head_offsets[head + 1])
        held = self.slot_positions[:, own].masked_fill(~self._is_held()[:, own], nobody)
        in_order = held.sort(dim=1).values[:, :room]
        return in_order.masked_fill(in_order == nobody, -1)

    def _is_held(self) -> torch.Tensor:  # [B, N]
        return (self.slot_positions >= 0) & ~self.pending

    def _held_inside(self, span: Span) -> torch.Tensor:  # [B, N]
        offset = self.slot_positions - self.start[:, None]
        return self._is_held() & (offset >= span[0]) & (offset < span[1])

    def holds(self, span: Span) -> bool:
        """Whether every head of every row still holds all tokens of the span that it has seen."""
        if self.is_empty:
            return True
        inside = self._held_inside(span)
        seen_inside = (self.seen - self.start).clamp(max=span[1]).sub(span[0]).clamp(min=0)  # [B]
        parts = zip(self.head_offsets, self.head_offsets[1:], strict=False)
        return all(bool((inside[:, start:stop].sum(1) == seen_inside).all()) for start, stop in parts)

    def set_rule(self, budgets: tuple[int, ...], protected: tuple[Span, ...]) -> None:
        super().set_rule(budgets, protected)
        before, self.head_offsets = self.head_offsets, self._offsets()
        if self.head_offsets != before:
            self.is_initialized = False  # allocated anew at the next token
        if self.is_initialized:
            with torch.inference_mode(False):
                self._read_rule()
            for span in protected:
                self.score.masked_fill_(self._held_inside(span), float("inf"))

    def memory_bytes(self) -> int:
        """Bytes held by the layer's tensors."""
        if not self.is_initialized:
            return 0
        tensors = [getattr(self, name) for name in (*self.row_state, "seen", "protected")]
        return sum(tensor.untyped_storage().nbytes() for tensor in tensors)

    def get_seq_length(self) -> Any:
        """Columns so far, evicted tokens and padding included; a tensor, so that a compiled step need not change."""
        return self.seen.clone() if self.is_initialized else 0

    def reset(self) -> None:
        super().reset()
        self.first_column = 0
        if self.is_initialized:
            self.slot_positions.fill_(-1)
            for name in ("pending", "start", "seen"):
                getattr(self, name).zero_()

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        if self.is_initialized:
            for name in self.row_state:
                state = getattr(self, name)
                state.copy_(state.index_select(0, beam_idx.to(state.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._change_batch(lambda state: state.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        self._change_batch(lambda state: state[indices.to(state.device)])

    def _change_batch(self, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
        if self.is_initialized:
            with torch.inference_mode(False):
                for name in self.row_state:
                    setattr(self, name, change(getattr(self, name)))
            self.batch_size = len(self.start)
