"""One layer's part in a pool of slots that all gated layers share."""

from typing import Any

import torch

from retention_gates.gates.attention.cache_layer import EvictingLayer
from retention_gates.gates.cache.pool import STATE, Pool
from retention_gates.gates.cache.saved_cache_checks import check_pool
from retention_gates.gates.policies import ScoredPolicy
from retention_gates.gates.policies.eviction_rule import Span
from retention_gates.kernels.gate_evict import GateOutput
from retention_gates.kernels.softmax import Softmax


class PoolLayer(EvictingLayer):
    """Attends to its own entries of the pool, and hands its new ones over; the last layer cuts all to the budgets."""

    pool: Pool
    index: int  # among the gated layers

    def join(self, pool: Pool, index: int) -> None:
        self.pool, self.index = pool, index
        self.row_state = STATE if index == 0 else ()  # the first layer tells of the pool's

    def saved_state(self) -> dict[str, torch.Tensor]:
        return {name: getattr(self.pool, name) for name in self.row_state}

    def restore(self, state: dict[str, torch.Tensor], columns: int) -> None:
        """Takes over the tensors of `row_state`, of any number of rows, as after so many columns read in one pass."""
        if self.index == 0:
            self.pool.restore(state, columns)
        self.batch_size, self.columns, self.passes = len(self.pool.start), columns, 1
        self.is_empty = self.is_attending = False

    @property
    def entry_numbers(self) -> int:
        """Numbers of an entry's key and value together."""
        return self.pool.keys.shape[-1] + self.pool.values.shape[-1]

    @property
    def slots(self) -> int:
        """The pool's, of which the first layer tells."""
        return self.pool.size if self.index == 0 else 0

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        self.dtype, self.device, self.batch_size = key_states.dtype, key_states.device, len(key_states)
        self.recent = self.rule.recent(self.device)
        self.is_initialized = True

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
        pool = self.pool
        if self.index == 0:
            pool.begin(key, value, padding_mask)
        self._check_like_first(key, value)
        self.keys, self.values = pool.keys, pool.values  # where they are, for the count of bytes
        output = pool.attend(self.index, query, key, value, softmax)
        with torch.no_grad():
            pool.entering.append((key, value, self._score(log_beta, key, value)))
            if len(pool.entering) == pool.layers:
                pool.cut(self.recent)
        self.is_empty = self.is_attending = False
        return output

    def _check_like_first(self, key: torch.Tensor, value: torch.Tensor) -> None:
        pool = self.pool
        shapes = [(t.device, t.dtype, t.shape[-1]) for t in (key, pool.keys, value, pool.values)]
        if shapes[0] != shapes[1] or shapes[2] != shapes[3]:
            raise ValueError(
                f'budgets="global" needs layers alike, on one device: layer {self.rule.layer} makes keys on '
                f"{shapes[0][0]} of {shapes[0][2]} numbers and the first one on {shapes[1][0]} of {shapes[1][2]}. "
                'Choose budgets="calibrated".'
            )

    def _score(
        self, log_beta: torch.Tensor | GateOutput, key: torch.Tensor, value: torch.Tensor
    ) -> torch.Tensor:  # [B, H, T]
        assert isinstance(self.rule.policy, ScoredPolicy)
        assert isinstance(log_beta, torch.Tensor)
        new = self.rule.new_tokens(log_beta, key, value, self.pool.offset)
        is_protected = self.rule.is_protected(self.pool.offset)[:, None]
        return self.rule.policy.score(new).masked_fill(is_protected, float("inf"))

    @property
    def why_not_captured(self) -> str | None:
        return 'budgets="global" sort the entries of all layers'

    @property
    def why_rows_stay(self) -> str | None:
        return 'budgets="global" keep one pool for all layers'

    def check_saved(self, name: str, state: dict[str, torch.Tensor], columns: int) -> list[str]:
        return check_pool(name, state, self.pool, columns) if state else []

    def positions(self, head: int) -> torch.Tensor:
        """Positions that a KV head holds between two steps, [B, S] ascending, -1 where it holds fewer than S."""
        self.check_head(head)
        if not self.pool.is_initialized:
            return torch.full((0, self.pool.most), -1)
        nobody = torch.iinfo(torch.int64).max
        own = self.pool.owner == self.index * self.pool.heads + head
        held = self.pool.slot_positions.masked_fill(~own | (self.pool.slot_positions < 0), nobody)
        in_order = held.sort(dim=1).values[:, : self.pool.most]
        return in_order.masked_fill(in_order == nobody, -1)

    def holds(self, span: Span) -> bool:
        """Whether every head of every row still holds all tokens of the span that it has seen."""
        if self.is_empty:
            return True
        pool = self.pool
        inside = pool.inside(span)
        seen_inside = (pool.seen - pool.start).clamp(max=span[1]).sub(span[0]).clamp(min=0)  # [B]
        heads = range(self.index * pool.heads, (self.index + 1) * pool.heads)
        return all(bool(((inside & (pool.owner == head)).sum(1) == seen_inside).all()) for head in heads)

    def set_rule(self, budgets: tuple[int, ...], protected: tuple[Span, ...]) -> None:
        super().set_rule(budgets, protected)
        if self.is_initialized:
            self.recent = self.rule.recent(self.device)
            for span in protected:
                self.pool.score.masked_fill_(self.pool.inside(span), float("inf"))

    def memory_bytes(self) -> int:
        """The pool's, of which the first layer tells."""
        return self.pool.memory_bytes() if self.index == 0 else 0

    def get_seq_length(self) -> Any:
        """Columns so far, evicted tokens and padding included."""
        return self.pool.seen.clone() if self.pool.is_initialized else 0

    def reset(self) -> None:
        super().reset()
        if self.index == 0:
            self.pool.reset()

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        self._change_batch(lambda state: state.index_select(0, beam_idx.to(state.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._change_batch(lambda state: state.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        self._change_batch(lambda state: state[indices.to(state.device)])

    def _change_batch(self, change: Any) -> None:
        if self.is_initialized:
            if self.index == 0:
                self.pool.change_rows(change)
            self.batch_size = len(self.pool.start)
            self.keys, self.values = self.pool.keys, self.pool.values
