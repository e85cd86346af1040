"""One pool of slots for all gated layers and heads, whose budgets move between them at run time."""

from collections.abc import Callable

import torch
import torch.nn.functional as F

from retention_gates.gates.attention.chunked import attend_in_blocks
from retention_gates.gates.policies.eviction_rule import Span
from retention_gates.kernels.gate_evict import lowest, place_chunk
from retention_gates.kernels.softmax import Softmax

MOST_OF_LAYER = 8  # times its mean that a layer may hold: as many places are looked through when it attends
STATE = ("keys", "values", "score", "slot_positions", "owner", "start")  # one row per sequence of the batch
PLACES = ("order", "ends")  # what follows from it


class Pool:
    """memory_size entries per head in the mean, of any layer and head; no entry moves, none is copied to the host.

    The rule: after the last layer has attended at step t, while all heads of all layers together hold more than their
    budgets, the entry of lowest priority goes; of equals, the lowest position, then the first layer and head. A layer
    holds at most `most` entries; beyond, its own lowest are evicted first.

    State, allocated at the first token, for P slots, L layers and H heads: keys [B, P, D]; values [B, P, Dv]; score
    [B, P] fp32, inf for protected entries; slot_positions [B, P] int64, -1 for empty; owner [B, P], layer * H + head;
    start [B]; order [B, P], the slots by layer, and ends [B, L + 1], where in it each layer begins and the last one
    ends; seen [].

    Method: DBTrimKV, "Make Each Token Count", arXiv 2605.09649, eviction across the heads of all layers. The limit of
    a layer is ours.
    """

    keys: torch.Tensor
    values: torch.Tensor
    score: torch.Tensor
    slot_positions: torch.Tensor
    owner: torch.Tensor
    order: torch.Tensor
    ends: torch.Tensor
    start: torch.Tensor
    seen: torch.Tensor
    positions: torch.Tensor  # [B, T] of this pass, -1 for padding
    offset: torch.Tensor  # [B, T] of this pass

    def __init__(self, layers: int, heads: int, memory_size: int, buffer_size: int, linear_in_age: bool):
        self.layers, self.heads, self.linear_in_age = layers, heads, linear_in_age
        self.total = layers * heads * memory_size
        self.room = layers * heads * buffer_size
        self.size = self.total + self.room
        self.most = min(self.size, MOST_OF_LAYER * heads * memory_size)
        self.is_initialized, self.is_empty, self.is_padded = False, True, False
        self.entering: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = []  # key, value, score of each layer

    def allocate(self, key: torch.Tensor, value: torch.Tensor) -> None:
        batch, device = len(key), key.device
        shape = (batch, self.size)
        with torch.inference_mode(False):
            self.keys = torch.zeros(*shape, key.shape[3], dtype=key.dtype, device=device)
            self.values = torch.zeros(*shape, value.shape[3], dtype=value.dtype, device=device)
            self.score = torch.zeros(shape, device=device)
            self.slot_positions = torch.full(shape, -1, device=device)
            self.owner = torch.zeros(shape, dtype=torch.int64, device=device)
            self.order = torch.zeros(shape, dtype=torch.int64, device=device)
            self.ends = torch.zeros(batch, self.layers + 1, dtype=torch.int64, device=device)
            self.start = torch.zeros(batch, dtype=torch.int64, device=device)
            self.seen = torch.zeros((), dtype=torch.int64, device=device)
        self.is_initialized = True

    def begin(self, key: torch.Tensor, value: torch.Tensor, padding_mask: torch.Tensor | None) -> None:
        """A pass of T tokens begins in the first layer. Its mask, [B, S] or None, may call past columns padding."""
        if not self.is_initialized:
            self.allocate(key, value)
        batch, tokens = len(key), key.shape[2]
        self.entering = []
        columns = (self.seen + torch.arange(tokens, device=key.device)).expand(batch, tokens)
        self.positions, self.is_padded = columns, False
        if padding_mask is not None:
            past, valid = padding_mask[:, :-tokens], padding_mask[:, -tokens:]
            if not self.is_empty and past.shape[1]:
                real = past.gather(1, self.slot_positions.clamp(0, past.shape[1] - 1))
                self.slot_positions.masked_fill_(~real & (self.slot_positions < past.shape[1]), -1)
            leading = (valid.cumsum(1) == 0).sum(1)
            self.start += leading.where(self.start == self.seen, 0)  # rows that have not begun yet
            self.positions, self.is_padded = columns.where(valid, -1), tokens == 1 or not bool(valid.all())
        self.offset = columns - self.start[:, None]

    def attend(
        self,
        layer: int,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        softmax: Softmax,
    ) -> torch.Tensor:
        """New tokens attend to what the layer's heads hold and to each other."""
        group = query.shape[1] // self.heads
        if self.is_empty and softmax.is_plain and not self.is_padded:
            return F.scaled_dot_product_attention(
                query, key, value, is_causal=True, scale=softmax.scale, enable_gqa=group > 1
            )
        index, exists = self._places(layer)
        positions = self.slot_positions.gather(1, index).masked_fill(~exists, -1)  # [B, S]
        of_head = self.owner.gather(1, index) - layer * self.heads
        keys, values = (
            tensor.gather(1, index[..., None].expand(-1, -1, tensor.shape[2])) for tensor in (self.keys, self.values)
        )
        outputs = []
        for head in range(self.heads):
            queries = slice(head * group, (head + 1) * group)
            output = attend_in_blocks(
                query[:, queries],
                (keys, values, positions.masked_fill(of_head != head, -1)),
                (key[:, head : head + 1], value[:, head : head + 1], self.positions),
                (0, self.most),
                softmax.of_heads(queries),
            )
            outputs.append(output)
        return torch.cat(outputs, dim=1)

    def _places(self, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The slots that a layer's entries lie in, and which of these places exist, [B, most]."""
        rank = self.ends[:, layer, None] + torch.arange(self.most, device=self.ends.device)
        return self.order.gather(1, rank.clamp(max=self.size - 1)), rank < self.ends[:, layer + 1, None]

    def cut(self, recent: torch.Tensor | None) -> None:
        """Takes in what the layers left, after the last has attended, and evicts what is too much.

        Args:
            recent: int64 [H], the age below which an entry of a head stays, or None.
        """
        batch, tokens = self.positions.shape
        owners = torch.arange(self.layers * self.heads, device=self.owner.device)
        self.seen += tokens
        keys, values, score = (torch.cat(parts, dim=1).flatten(1, 2) for parts in zip(*self.entering, strict=True))
        self.entering = []
        new_positions = self.positions.repeat(1, len(owners))  # [B, L * H * T]
        new_owner = owners.repeat_interleave(tokens).expand(batch, -1)
        positions = torch.cat([self.slot_positions, new_positions], dim=1)
        owner = torch.cat([self.owner, new_owner], dim=1)
        victims = self._victims(positions, owner, torch.cat([self.score, score], dim=1), recent)
        entering = ((self.keys, keys), (self.values, values), (self.score, score), (self.owner, new_owner))
        place_chunk(
            [(state, new[:, None]) for state, new in entering],
            self.slot_positions,
            new_positions,
            victims[:, None],
            (0, self.size),
        )
        self._sort()
        self.is_empty = False

    def _sort(self) -> None:
        """Finds the places of every layer anew."""
        layer = torch.where(self.slot_positions >= 0, self.owner // self.heads, self.layers)
        in_order, order = layer.sort(dim=1, stable=True)
        self.order.copy_(order)
        bounds = torch.arange(self.layers + 1, device=layer.device).expand(len(layer), -1).contiguous()
        self.ends.copy_(torch.searchsorted(in_order, bounds))

    def _victims(
        self, positions: torch.Tensor, owner: torch.Tensor, score: torch.Tensor, recent: torch.Tensor | None
    ) -> torch.Tensor:
        """Returns the entries to evict, bool [B, P + n], over the slots and the new entries."""
        inf, exists = float("inf"), positions >= 0
        age = self.seen - 1 - positions
        # a protected token's score is inf, which an age of 0 would turn into NaN
        priority = (age * score).masked_fill(score == inf, inf) if self.linear_in_age else score
        if recent is not None:
            priority = priority.masked_fill(age < recent[owner % self.heads], inf)
        priority = priority.masked_fill(~exists, inf)
        ties = positions * (self.layers * self.heads) + owner  # the lowest position, then the first layer and head
        beyond = self._beyond_most(priority, ties, torch.where(exists, owner // self.heads, self.layers))
        count = (exists & ~beyond).sum(1)
        surplus = (count - self.total).where(count >= self.total + self.room, 0)
        priority = priority.masked_fill(beyond, inf)
        return beyond | lowest(priority[:, None], ties[:, None], surplus[:, None], priority.shape[1] + 1)[:, 0]

    def _beyond_most(self, priority: torch.Tensor, ties: torch.Tensor, layer: torch.Tensor) -> torch.Tensor:
        """The lowest entries of layers that hold more than they may, bool [B, P + n]."""
        if self.most == self.size:
            return torch.zeros_like(layer, dtype=torch.bool)
        order = ties.argsort(dim=1)
        for key in (priority, layer):
            order = order.gather(1, key.gather(1, order).argsort(dim=1, stable=True))
        in_order = layer.gather(1, order)
        bounds = torch.arange(self.layers + 2, device=layer.device).expand(len(layer), -1).contiguous()
        ends = torch.searchsorted(in_order, bounds)  # [B, L + 2], empty places last
        surplus = (ends.diff(dim=1) - self.most).clamp(min=0)  # [B, L + 1]
        surplus[:, -1] = 0
        rank = torch.arange(layer.shape[1], device=layer.device) - ends.gather(1, in_order)
        return torch.zeros_like(layer, dtype=torch.bool).scatter_(1, order, rank < surplus.gather(1, in_order))

    def inside(self, span: Span) -> torch.Tensor:
        """Returns the slots that hold a token of the span, bool [B, P]."""
        offset = self.slot_positions - self.start[:, None]
        return (self.slot_positions >= 0) & (offset >= span[0]) & (offset < span[1])

    def change_rows(self, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
        if self.is_initialized:
            with torch.inference_mode(False):
                for name in (*STATE, *PLACES):
                    setattr(self, name, change(getattr(self, name)))

    def restore(self, state: dict[str, torch.Tensor], columns: int) -> None:
        """Takes over the tensors of STATE, of any number of rows, as after so many columns."""
        for name, tensor in state.items():
            setattr(self, name, tensor)
        self.order = torch.zeros_like(self.owner)
        self.ends = self.owner.new_zeros(len(self.owner), self.layers + 1)
        self._sort()
        self.seen.fill_(columns)
        self.is_empty = False

    def reset(self) -> None:
        self.is_empty, self.entering = True, []
        if self.is_initialized:
            self.slot_positions.fill_(-1)
            for state in (self.start, self.seen, self.ends):
                state.zero_()

    def memory_bytes(self) -> int:
        if not self.is_initialized:
            return 0
        return sum(getattr(self, name).untyped_storage().nbytes() for name in (*STATE, *PLACES, "seen"))
