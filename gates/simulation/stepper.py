"""Evictions of policies that look at what is held, simulated step by step over a sequence known beforehand."""

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch

from retention_gates.gates.attention.masked import masked_attention
from retention_gates.gates.cache import feedback
from retention_gates.gates.policies import FeedbackPolicy, Held, NewTokens
from retention_gates.gates.policies.eviction_rule import EvictionRule
from retention_gates.kernels.capture import capture, on_capture_stream
from retention_gates.kernels.ragged_decode_attention import entry_weights
from retention_gates.kernels.softmax import Softmax

NEVER = 2**62  # a step that no sequence comes to
# When each token is no longer seen, the first such step, int64 [B, H, T]; and the attention's output [B, HQ, T, Dv] if
# entries are merged, which attention under those times cannot know.
Result = tuple[torch.Tensor, torch.Tensor | None]


def run_side_by_side(steppers: Sequence["Stepper"], tokens: int) -> list[Result]:
    """All steps of all steppers, which stand before their first one.

    Captured steps of several run in streams of their own: the small operations of one leave most of a GPU idle.
    """
    captured = [stepper for stepper in steppers if stepper.is_captured]
    if len(captured) > 1:
        current = torch.cuda.current_stream(captured[0].query.device)
        streams = [torch.cuda.Stream(current.device) for _ in captured]  # from a pool that torch keeps
        for stream in streams:
            stream.wait_stream(current)
        for index in range(tokens):  # one after the other: a queue that is full would make the others wait
            for stepper, stream in zip(captured, streams, strict=True):
                with torch.cuda.stream(stream):
                    stepper.step(index)
        for stream in streams:
            current.wait_stream(stream)
    for stepper in [each for each in steppers if len(captured) < 2 or not each.is_captured]:
        for index in range(tokens):
            stepper.step(index)
    return [stepper.result() for stepper in steppers]


class Stepper:
    """When a bounded cache would evict each token, for all rows and all rules of one policy side by side.

    In one layer queries, keys and values of all steps are known before the first eviction; what is evicted decides
    only which weights an entry receives. So a step is a handful of small operations on [B, H, S], and no model runs.
    On CUDA the step is captured once and replayed, for every layer that comes with the same shapes.

    Args:
        rules: of one layer; they differ in their budgets only, and in no interval. The batch has the first rule's rows
            first, and so on.
        softmax: of the attention, with any sinks: those of each layer come with its tensors.
    """

    # of the layer that is simulated
    query: torch.Tensor  # [B, HQ, T, D]
    key: torch.Tensor  # [B, H, T, D]
    value: torch.Tensor  # [B, H, T, Dv]
    new_state: torch.Tensor  # [B, H, T, K]
    free_from: torch.Tensor  # int64 [B, H, T], the first step at which a token may be evicted
    surplus: torch.Tensor  # int64 [B, H or 1, T], the entries that must go at each step
    real: torch.Tensor  # bool [B, T], False for padding
    columns: torch.Tensor  # int64 [B, H, T], -1 for padding
    start: torch.Tensor  # [B]
    sinks: torch.Tensor | None  # [HQ]
    # as of the step that is simulated
    positions: torch.Tensor  # int64 [B, H, S], -1 for an empty place, -2 for one that the head does not have
    slots: dict[str, torch.Tensor]  # keys and values [B, H, S, D] as far as they are needed at every step
    output: torch.Tensor | None  # [B, HQ, T, Dv] if entries are merged
    times: torch.Tensor  # int64 [B, H, T + 1]; the last column belongs to no token
    column: torch.Tensor  # int64 [1], the step
    kinds: list[tuple[bool, bool]]  # of each step, the arguments of `_step`

    def __init__(self, rules: Sequence[EvictionRule], softmax: Softmax):
        policy = rules[0].policy
        assert isinstance(policy, FeedbackPolicy)
        self.rules, self.policy, self.rule = rules, policy, rules[0]
        self.softmax = softmax
        self.graphs: dict[tuple[bool, bool], torch.cuda.CUDAGraph] = {}  # by the kind of step
        self.is_ready = False

    @torch.no_grad()
    def begin(
        self, query: torch.Tensor, new: NewTokens, valid: torch.Tensor | None, sinks: torch.Tensor | None
    ) -> None:
        """Takes a layer's tensors and stands before the first step.

        Args:
            query: [B, HQ, T, D], after RoPE.
            valid: bool [B, T], False for padding, or None.
            sinks: [HQ] or None.
        """
        if not self.is_ready:
            self.is_captured = query.device.type == "cuda" and not self.policy.reads_back
            self._allocate(query, new)
        self._load(query, new, valid, sinks)
        self._reset()
        interval, due = self.rule.interval, self._due(query.shape[2])
        self.kinds = [((step + 1) % interval == 0, due[step]) for step in range(query.shape[2])]
        if self.is_captured:
            self._capture(set(self.kinds) - self.graphs.keys())

    @torch.no_grad()
    def step(self, index: int) -> None:
        if self.is_captured:
            self.graphs[self.kinds[index]].replay()
        else:
            self._step(*self.kinds[index])

    def result(self) -> Result:
        """After the last step."""
        times = self.times[:, :, :-1].clone()
        if self.is_padded:
            times.masked_fill_(~self.real[:, None], 0)
        return times, self.output

    def _load(
        self, query: torch.Tensor, new: NewTokens, valid: torch.Tensor | None, sinks: torch.Tensor | None
    ) -> None:
        """Takes a layer's tensors; where a captured step reads them, into the same memory as the last layer's."""
        batch, _, tokens, _ = query.shape
        self.is_padded = valid is not None
        real = query.new_ones((batch, tokens), dtype=torch.bool) if valid is None else valid
        columns = torch.arange(tokens, device=query.device).where(real, -1)
        tensors: dict[str, Any] = {
            "query": query.to(self.dtype),
            "key": new.key.to(self.dtype),
            "value": new.value.to(self.dtype),
            "new_state": self.policy.initial_state(new),
            "real": real,
            "columns": columns[:, None].expand(-1, new.key.shape[1], -1),
            "start": (real.cumsum(1) == 0).sum(1),
            "sinks": sinks,
        }
        never_goes = (self.rule.is_protected(new.offset) | ~real)[:, None]
        free_from = tensors["columns"] + (0 if self.recent is None else self.recent[..., None])
        tensors["free_from"] = free_from.masked_fill(never_goes, NEVER)
        tensors["surplus"] = self._surplus(real)
        for name, tensor in tensors.items():
            if self.graphs and tensor is not None:
                getattr(self, name).copy_(tensor)
            elif self.is_captured and tensor is not None:  # memory of its own, which the next layers overwrite
                setattr(self, name, tensor.clone(memory_format=torch.contiguous_format))
            else:
                setattr(self, name, tensor)

    def _allocate(self, query: torch.Tensor, new: NewTokens) -> None:
        batch, heads, tokens, head_dim = new.key.shape
        rules, rows, device = self.rules, batch // len(self.rules), new.key.device
        merges = self.policy.merge is not None
        # merged entries must be rounded as the cache rounds them; others are looked at in fp32 only
        self.dtype = new.key.dtype if merges else torch.float32
        sizes = torch.tensor([rule.sizes for rule in rules], device=device).repeat_interleave(rows, dim=0)  # [B, H]
        settings = [rule.setting(rows, self.softmax.scale, device) for rule in rules]
        self.setting = settings[0]._replace(budgets=torch.cat([one.budgets for one in settings]))
        recents = [recent for recent in (rule.recent(device) for rule in rules) if recent is not None]
        self.recent = torch.stack(recents).repeat_interleave(rows, dim=0) if recents else None
        floors = [rule.floor for rule in rules if rule.floor is not None]
        self.floor = torch.tensor(floors, device=device).repeat_interleave(rows)[:, None] if floors else None
        shape = (batch, heads, int(sizes.max()))
        self.no_positions = torch.full(shape, -1, device=device)
        self.no_positions[torch.arange(shape[2], device=device) >= sizes[..., None]] = -2
        group = query.shape[1] // heads
        self.positions = torch.empty_like(self.no_positions)
        self.evictable_from = torch.empty_like(self.no_positions)
        self.priority = torch.empty(shape, device=device)
        self.state = torch.empty(*shape, self.policy.state_width(head_dim), device=device)
        self.head_state = torch.empty(batch, heads, self.policy.head_state_size(head_dim, group), device=device)
        self.times = torch.empty(batch, heads, tokens + 1, dtype=torch.int64, device=device)
        self.column = torch.empty(1, dtype=torch.int64, device=device)
        self.slots = {}
        if self.policy.needs_attention or merges:
            self.slots["keys"] = torch.empty(*shape, head_dim, dtype=self.dtype, device=device)
        self.output, value_dim = None, new.value.shape[3]
        if merges:
            self.slots["values"] = torch.empty(*shape, value_dim, dtype=self.dtype, device=device)
            self.output = torch.empty(*query.shape[:3], value_dim, dtype=self.dtype, device=device)
        self.is_ready = True

    def _surplus(self, real: torch.Tensor) -> torch.Tensor:
        """Counts the entries to evict at each step, [B, H or 1, T]: known beforehand, because only numbers count."""
        read = real.cumsum(1)[:, None]  # [B, 1, T]
        budgets, buffer_size = self.setting.budgets[..., None], self.rule.buffer_size
        if self.rule.is_shared:
            buffer_size *= budgets.shape[1]
            read, budgets = read * budgets.shape[1], budgets.sum(1, keepdim=True)
        above = read - budgets
        is_due = real[:, None] & (above > 0) & (above % buffer_size == 0)
        return is_due * buffer_size

    def _due(self, tokens: int) -> list[bool]:
        """At which steps the policy learns anything."""
        if self.policy.is_due is None:
            return [self.policy.observe is not None] * tokens
        offsets = torch.arange(tokens, device=self.start.device) - self.start[:, None]
        due: list[bool] = self.policy.is_due(offsets, self.setting.budgets).any(0).tolist()
        return due

    def _reset(self) -> None:
        self.positions.copy_(self.no_positions)
        self.evictable_from.fill_(NEVER)
        for tensor in (self.state, self.head_state, self.column, *self.slots.values()):
            tensor.zero_()
        self.priority.fill_(float("inf"))
        self.times.fill_(self.times.shape[2] - 1)

    def _capture(self, kinds: set[tuple[bool, bool]]) -> None:
        """Captures a step of each kind: those that give new priorities or don't, and learn something or don't."""
        for kind in kinds:
            step, device = partial(self._step, *kind), self.query.device
            for _ in range(min(3, self.query.shape[2])):
                on_capture_stream(step, device)
            _, self.graphs[kind] = capture(step, device)
            self._reset()

    def _at_column(self, x: torch.Tensor, dim: int = 2) -> torch.Tensor:
        return x.index_select(dim, self.column)

    def _read(self, name: str) -> torch.Tensor:
        if name in self.slots:
            return self.slots[name]
        whole = {"keys": self.key, "values": self.value}[name]
        return whole.gather(2, self.positions.clamp(min=0)[..., None].expand(-1, -1, -1, whole.shape[3]))

    def _step(self, refreshes: bool, observes: bool) -> None:
        policy, rule = self.policy, self.rule
        slot = (self.positions == -1).to(torch.uint8).argmax(2, keepdim=True)  # [B, H, 1], the first empty one
        self.positions.scatter_(2, slot, self._at_column(self.columns))
        self.evictable_from.scatter_(2, slot, self._at_column(self.free_from))
        entering = [(self.state, self.new_state)]
        entering += [(slots, {"keys": self.key, "values": self.value}[name]) for name, slots in self.slots.items()]
        for held_of, token_of in entering:
            held_of.scatter_(2, slot[..., None].expand(-1, -1, -1, held_of.shape[3]), self._at_column(token_of))
        query, is_real = self._at_column(self.query), self._at_column(self.real, dim=1)
        arguments: Any = (query, is_real, self.column[0], self.start, self._read, self.setting)
        held = Held(self.positions, self.state, self.head_state, *arguments)
        softmax = self.softmax._replace(sinks=self.sinks)
        if observes:
            weights = None
            if policy.needs_attention:
                weights = entry_weights(query, self.slots["keys"], held.exists[:, :, None], softmax)
            feedback.observe(policy, held, weights, self.is_padded)
        if self.output is not None:
            visible = held.exists[:, :, None]
            output = masked_attention(query, self.slots["keys"], self.slots["values"], visible, softmax)
            self.output.index_copy_(2, self.column, output)
        if refreshes:
            self.priority.copy_(feedback.priorities(policy, held))
        else:
            self.priority.scatter_(2, slot, float("inf"))
        stays, surplus = self.evictable_from > self.column, self._at_column(self.surplus)[..., 0]
        victims = feedback.victims(self.priority, held, stays, surplus, rule.most_victims, self.floor, rule.reserved)
        if policy.merge is not None:
            merged = policy.merge(held, victims, rule.most_victims)
            for slots, entries in zip(self.slots.values(), merged, strict=True):
                slots.copy_(entries)
        if held.state is not self.state:
            self.state.copy_(held.state)
        gone = self.positions.where(victims, self.times.shape[2] - 1)
        self.times.scatter_(2, gone, (self.column + 1).expand_as(gone))
        self.positions.masked_fill_(victims, -1)
        self.evictable_from.masked_fill_(victims, NEVER)
        self.column.add_(1)
