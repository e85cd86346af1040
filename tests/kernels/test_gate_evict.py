"""gate_evict and chunk_evict against plain Python: what is held, what each slot contains, and that nothing moves."""

from itertools import accumulate

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from plain_eviction import PlainHead

from retention_gates.kernels.gate_evict import GateOutput, SlotState, chunk_evict, gate_evict

INF = float("inf")


class Slots:
    """A layer's state, driven through the two ops."""

    def __init__(self, batch, budgets, buffer_size, head_dim=2, value_dim=3):
        self.offsets = tuple(accumulate((budget + buffer_size for budget in budgets), initial=0))
        slots = self.offsets[-1]
        self.keys, self.values = torch.zeros(batch, slots, head_dim), torch.zeros(batch, slots, value_dim)
        self.score = torch.full((batch, slots), float("nan"))  # an empty slot's score must not matter
        self.positions = torch.full((batch, slots), -1)
        self.pending = torch.zeros(batch, slots, dtype=torch.bool)
        self.start, self.seen = torch.zeros(batch, dtype=torch.int64), torch.zeros((), dtype=torch.int64)

    def read(self, score, valid, **rule):
        """Takes in the next tokens; score [B, H, T], valid [B, T]."""
        first = int(self.seen)
        batch, heads, tokens = score.shape
        columns = torch.arange(first, first + tokens)
        # every entry's key and value tell its head and position
        identity = (torch.arange(heads)[:, None] * 1000.0 + columns)[None, :, :, None].expand(batch, -1, -1, -1)
        key, value = identity.expand(-1, -1, -1, 2), identity.expand(-1, -1, -1, 3) + 0.5
        positions = columns.expand(batch, -1).where(valid, -1)
        if tokens == 1:
            mask = torch.cat([torch.ones(batch, first, dtype=torch.bool), valid], dim=1)
            gate_evict(self.state, key, value, score[:, :, 0], self.offsets, padding_mask=mask, **rule)
            assert self.seen == first + 1
        else:
            self.seen += tokens
            self.positions.masked_fill_(self.pending, -1)
            self.pending.zero_()
            chunk_evict(self.state, key, value, score, positions, self.seen - 1, self.offsets, **rule)

    @property
    def state(self):
        return SlotState(self.keys, self.values, self.score, self.positions, self.pending, self.start, self.seen)

    def held(self, row, head, pending=False):
        own = slice(self.offsets[head], self.offsets[head + 1])
        there = self.positions[row, own][(self.positions[row, own] >= 0) & (~self.pending[row, own] | pending)]
        assert len(there.unique()) == len(there)
        return set(there.tolist())

    def check_contents(self):
        for head, (start, stop) in enumerate(zip(self.offsets, self.offsets[1:], strict=False)):
            positions = self.positions[:, start:stop]
            occupied = positions >= 0
            assert (self.keys[:, start:stop, 0] == head * 1000.0 + positions)[occupied].all()
            assert (self.values[:, start:stop, 2] == head * 1000.0 + positions + 0.5)[occupied].all()


@st.composite
def cases(draw):
    heads = draw(st.integers(1, 3))
    buffer_size = draw(st.integers(1, 4))
    protected_count = draw(st.integers(0, 2))
    budgets = draw(st.lists(st.integers(protected_count + 1, 12), min_size=heads, max_size=heads))
    recent = [draw(st.integers(0, budget - protected_count)) for budget in budgets]
    chunks = draw(st.lists(st.sampled_from([1, 1, 1, 1, 2, 5, 30]), min_size=1, max_size=25))
    tokens = sum(chunks)
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    score = -torch.randint(0, draw(st.integers(1, 8)) + 1, (2, heads, tokens), generator=generator) / 7.0
    padding = draw(st.integers(0, tokens))
    valid = torch.arange(tokens).expand(2, tokens) >= torch.tensor([[0], [padding]])
    valid = valid & (torch.rand(2, tokens, generator=generator) < draw(st.sampled_from([0.7, 1.0])))
    protected = [set(torch.randperm(tokens, generator=generator)[:protected_count].tolist()) for _ in range(2)]
    return score, valid, budgets, chunks, protected, recent, draw(st.booleans()), buffer_size


@given(cases())
def test_equals_plain_python(case):
    score, valid, budgets, chunks, protected, recent, linear, buffer_size = case
    slots = Slots(2, budgets, buffer_size)
    plain = [
        [
            PlainHead(budget, linear, buffer_size, recent[head], protected=protected[row])
            for head, budget in enumerate(budgets)
        ]
        for row in range(2)
    ]
    with_protected = score.clone()
    for row in range(2):
        with_protected[row][:, list(protected[row])] = INF
    first = 0
    for tokens in chunks:
        now = slice(first, first + tokens)
        before = slots.positions.clone()
        slots.read(
            with_protected[:, :, now],
            valid[:, now],
            linear_in_age=linear,
            buffer_size=buffer_size,
            recent=torch.tensor(recent),
        )
        stayed = (slots.positions >= 0) & (slots.positions < first)
        assert torch.equal(slots.positions[stayed], before[stayed])
        slots.check_contents()
        for row in range(2):
            for head, budget in enumerate(budgets):
                seen = plain[row][head].read(
                    score[row, head, now].tolist(), list(range(first, first + tokens)), valid[row, now].tolist()
                )
                assert slots.held(row, head) == set(plain[row][head].held)
                assert len(slots.held(row, head)) < budget + buffer_size
                if tokens == 1:
                    assert slots.held(row, head, pending=True) == seen[-1]
        first += tokens


def test_worked_by_hand():
    slots = Slots(1, [2], 1)
    everyone = torch.ones(1, 1, dtype=torch.bool)
    for score, held, marked in [
        (-1.0, {0}, set()),
        (-3.0, {0, 1}, set()),
        (-9.0, {0, 2}, {1}),
        (-9.0, {0, 3}, {2}),
        (-9.0, {0, 4}, {3}),
    ]:
        slots.read(torch.tensor([[[score]]]), everyone, linear_in_age=True)
        assert slots.held(0, 0) == held
        assert slots.held(0, 0, pending=True) == held | marked
    assert slots.positions.tolist() == [[0, 3, 4]]  # each token took the slot of the one evicted before


def test_chunk_keeps_all_while_there_is_room_for_all():
    slots = Slots(1, [4], 3)
    valid = torch.ones(1, 6, dtype=torch.bool)
    slots.read(-torch.ones(1, 1, 6), valid, linear_in_age=True, buffer_size=3)
    assert slots.held(0, 0) == {0, 1, 2, 3, 4, 5}  # below budget + buffer_size
    slots.read(-torch.ones(1, 1, 2), valid[:, :2], linear_in_age=True, buffer_size=3)
    assert slots.held(0, 0) == {4, 5, 6, 7}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_state_keeps_its_dtype(dtype):
    slots = Slots(1, [3, 5], 1)
    slots.keys, slots.values = slots.keys.to(dtype), slots.values.to(dtype)
    rule = dict(linear_in_age=True)
    one = (
        torch.ones(1, 2, 1, 2, dtype=dtype),
        torch.ones(1, 2, 1, 3, dtype=dtype),
        torch.zeros(1, 2),
    )
    gate_evict(slots.state, *one, slots.offsets, **rule)
    assert slots.keys.dtype == dtype and slots.keys.sum() == 4


def arguments():
    slots = Slots(2, [2, 3], 1)
    return dict(
        state=slots.state,
        new_key=torch.zeros(2, 2, 1, 2),
        new_value=torch.zeros(2, 2, 1, 3),
        new_score=torch.zeros(2, 2),
        head_offsets=slots.offsets,
        linear_in_age=True,
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(new_key=torch.zeros(2, 2, 2, 2)), "chunk_evict"),
        (dict(new_value=torch.zeros(2, 2, 1, 4)), "new_value"),
        (dict(keys=torch.zeros(2, 6, 2)), "keys"),
        (dict(score=torch.zeros(2, 7, dtype=torch.float64)), "score"),
        (dict(positions=torch.zeros(2, 7)), "positions"),
        (dict(pending=torch.zeros(2, 6)), "pending"),
        (dict(new_score=torch.zeros(2, 3)), "new_score"),
        (dict(start=torch.zeros(3).long()), "start"),
        (dict(seen=torch.zeros(1).long()), "seen"),
        (dict(seen=torch.tensor(0)[None]), "seen"),
        (dict(recent=torch.zeros(2)), "recent"),
        (dict(protected=torch.zeros(2).long()), "protected"),
        (dict(padding_mask=torch.ones(2, 0).bool()), "S >= 1"),
        (dict(padding_mask=torch.ones(1, 1).bool()), "padding_mask"),
        (dict(padding_mask=torch.ones(2, 1)), "padding_mask"),
        (dict(new_score=GateOutput(torch.zeros(2, 5), torch.zeros(2, 4), torch.zeros(2))), "hidden"),
        (dict(new_score=GateOutput(torch.zeros(2, 5), torch.zeros(3, 5), torch.zeros(2))), "weight"),
        (dict(new_key=torch.zeros(2, 2, 1, 2, dtype=torch.bfloat16)), "new_key"),
        (dict(head_offsets=(0, 3)), "head_offsets"),
        (dict(head_offsets=(0, 1, 7)), "more slots"),
        (dict(buffer_size=0), "buffer"),
    ],
)
def test_bad_arguments(change, message):
    good = arguments()
    gate_evict(**good)
    of_state = {name: value for name, value in change.items() if name in SlotState._fields}
    others = {name: value for name, value in change.items() if name not in of_state}
    with pytest.raises(ValueError, match=message):
        gate_evict(**(arguments() | {"state": good["state"]._replace(**of_state)} | others))


def test_bad_arguments_of_a_chunk():
    good = arguments()
    good |= dict(
        step=torch.tensor(0), new_score=torch.zeros(2, 2, 1), new_positions=torch.zeros(2, 1, dtype=torch.int64)
    )
    chunk_evict(**good)
    for change in (
        dict(new_key=torch.zeros(2, 2, 0, 2)),
        dict(new_score=torch.zeros(2, 2)),
        dict(new_positions=torch.zeros(2)),
    ):
        with pytest.raises(ValueError, match=next(iter(change))):
            chunk_evict(**(good | change))
