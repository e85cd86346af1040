"""New tokens take the places of evicted ones, in place. See README.md in this folder."""

import itertools
from typing import NamedTuple

import torch

from retention_gates.kernels.checks import check_same_device, check_shape
from retention_gates.kernels.dispatch import use_cpu, use_fused
from retention_gates.kernels.gate_evict import cpu, naive
from retention_gates.kernels.gate_evict.layout import SlotState, device_offsets, slot_table
from retention_gates.kernels.gate_evict.naive import drop_padding, enter_token, lowest, place_chunk

__all__ = [
    "GateOutput",
    "SlotState",
    "chunk_evict",
    "device_offsets",
    "drop_padding",
    "enter_token",
    "gate_evict",
    "lowest",
    "place_chunk",
    "slot_table",
]


class GateOutput(NamedTuple):
    """The last layer of a gate, still to be computed: log_beta = logsigmoid(hidden weight^T + bias)."""

    hidden: torch.Tensor  # [B, W], activations of the last hidden layer, of any floating dtype
    weight: torch.Tensor  # [H, W] fp32
    bias: torch.Tensor  # [H] fp32


@torch.no_grad()
def gate_evict(
    state: SlotState,
    new_key: torch.Tensor,
    new_value: torch.Tensor,
    new_score: torch.Tensor | GateOutput,
    head_offsets: tuple[int, ...],
    *,
    linear_in_age: bool,
    buffer_size: int = 1,
    recent: torch.Tensor | None = None,
    protected: torch.Tensor | None = None,
    padding_mask: torch.Tensor | None = None,
) -> None:
    """Writes one token per row into a free slot of each head and marks the next victims; no other entry moves.

    First the slots marked before are freed. Then, if a head has no free slot left after the write, the buffer_size
    entries lowest by (step - position) * score, or by score, are marked; among equals the lowest position. Marked
    entries are still there for this step's attention. The step is `seen`, which then goes up by one.

    Args:
        state: the layer's slots, changed in place; a row's `start` while it has no real token.
        new_key: [B, H, 1, D]; new_value: [B, H, 1, Dv].
        new_score: fp32 [B, H], inf for a protected token; or the output layer of a gate, whose log_beta is the score.
        head_offsets: H + 1 integers; head h owns the slots head_offsets[h]:head_offsets[h + 1], as many as its budget
            and buffer_size together.
        linear_in_age: whether the score counts per step of age (retention: score = log_beta) or once.
        buffer_size: entries above its budget that a head may have before it evicts.
        recent: int64 [H], the age below which an entry is never marked.
        protected: int64 [P, 2], spans first <= position - start < end of tokens that are never evicted.
        padding_mask: bool [B, S], False for padding. Its last column is the new token, which does not enter if it is
            padding; the others are positions from 0 on, and an entry that they call padding goes.

    Raises:
        ValueError: for shapes, dtypes or devices that don't go together.
    """
    if new_key.ndim != 4 or new_key.shape[2] != 1:
        raise ValueError(f"new_key must be [B, H, 1, D], not {list(new_key.shape)}: chunk_evict takes several tokens.")
    _check_state(state, new_key, new_value, head_offsets, buffer_size)
    keys, _, _, positions, pending, start, seen = state
    batch, heads = new_key.shape[:2]
    check_shape("pending", pending, tuple(positions.shape), "[B, N]")
    check_shape("start", start, (batch,), "[B]")
    check_shape("seen", seen, (), "[]")
    gate = GateOutput(*new_score) if isinstance(new_score, tuple) else None
    scores = None if isinstance(new_score, tuple) else new_score
    if gate is None:
        assert scores is not None
        check_shape("new_score", scores, (batch, heads), "[B, H]")
    else:
        width = gate.weight.shape[-1]
        check_shape("the gate's hidden", gate.hidden, (batch, width), "[B, W]")
        check_shape("the gate's weight", gate.weight, (heads, width), "[H, W]")
        check_shape("the gate's bias", gate.bias, (heads,), "[H]")
    if protected is not None:
        check_shape("protected", protected, (len(protected), 2), "[P, 2]")
    if padding_mask is not None:
        if padding_mask.ndim != 2 or padding_mask.shape[1] == 0:
            raise ValueError(f"padding_mask must be [B, S] with S >= 1, not {list(padding_mask.shape)}.")
        check_shape("padding_mask", padding_mask, (batch, padding_mask.shape[1]), "[B, S]")
    _check_dtypes(
        (torch.bool, dict(pending=pending, padding_mask=padding_mask)),
        (torch.int64, dict(start=start, seen=seen, recent=recent, protected=protected)),
        (torch.float32, dict(new_score=scores) if gate is None else dict(weight=gate.weight, bias=gate.bias)),
    )
    check_same_device("keys", keys, pending=pending, start=start, seen=seen, new_score=scores)
    check_same_device("keys", keys, recent=recent, protected=protected, padding_mask=padding_mask)
    hidden, weight, bias = (None, None, None) if gate is None else gate
    check_same_device("keys", keys, hidden=hidden, weight=weight, bias=bias)
    form = naive.gate_evict
    if use_fused("gate_evict", keys):
        from retention_gates.kernels.gate_evict.fused import gate_evict as form
    elif use_cpu(keys):
        form = cpu.gate_evict
    form(
        state,
        new_key,
        new_value,
        scores,
        head_offsets,
        linear_in_age=linear_in_age,
        buffer_size=buffer_size,
        recent=recent,
        protected=protected,
        padding_mask=padding_mask,
        gate_hidden=hidden,
        gate_weight=weight,
        gate_bias=bias,
    )


def _check_dtypes(*expected: tuple[torch.dtype, dict[str, torch.Tensor | None]]) -> None:
    for dtype, tensors in expected:
        for name, tensor in tensors.items():
            if tensor is not None and tensor.dtype != dtype:
                raise ValueError(f"{name} must be {dtype}, not {tensor.dtype}.")


@torch.no_grad()
def chunk_evict(
    state: SlotState,
    new_key: torch.Tensor,
    new_value: torch.Tensor,
    new_score: torch.Tensor,
    new_positions: torch.Tensor,
    step: torch.Tensor,
    head_offsets: tuple[int, ...],
    *,
    linear_in_age: bool,
    buffer_size: int = 1,
    recent: torch.Tensor | None = None,
) -> None:
    """Takes in several tokens at once, after they have attended: what is held and what is new are cut to the budgets.

    A head with fewer than budget + buffer_size entries, the new ones included, keeps all. Any other keeps its budget:
    those highest by the rule of `gate_evict`, as of the last new token. Entries that stay do not move. Slots that
    `gate_evict` marked must have been freed.

    Args: as for `gate_evict`, but
        new_key: [B, H, T, D]; new_value: [B, H, T, Dv]; new_score: fp32 [B, H, T].
        new_positions: int64 [B, T], -1 for padding.
        step: int64 [], the position of the last new token.

    Raises:
        ValueError: for shapes, dtypes or devices that don't go together.
    """
    if new_key.ndim != 4 or new_key.shape[2] == 0:
        raise ValueError(f"new_key must be [B, H, T, D] with T >= 1, not {list(new_key.shape)}.")
    _check_state(state, new_key, new_value, head_offsets, buffer_size)
    batch, heads, tokens, _ = new_key.shape
    check_shape("new_score", new_score, (batch, heads, tokens), "[B, H, T]")
    check_shape("new_positions", new_positions, (batch, tokens), "[B, T]")
    check_same_device("keys", state.keys, new_score=new_score, new_positions=new_positions, recent=recent)
    naive.chunk_evict(
        state,
        new_key,
        new_value,
        new_score,
        new_positions,
        step,
        head_offsets,
        linear_in_age=linear_in_age,
        buffer_size=buffer_size,
        recent=recent,
    )


def _check_state(
    state: SlotState,
    new_key: torch.Tensor,
    new_value: torch.Tensor,
    head_offsets: tuple[int, ...],
    buffer_size: int,
) -> None:
    keys, values, score, positions = state[:4]
    batch, heads, tokens, head_dim = new_key.shape
    slots = head_offsets[-1]
    sizes = [stop - start for start, stop in itertools.pairwise(head_offsets)]
    if len(sizes) != heads or head_offsets[0] != 0:
        raise ValueError(f"head_offsets must be 0 and where each of the {heads} heads ends, not {head_offsets}.")
    if buffer_size < 1 or min(sizes) <= buffer_size:
        raise ValueError(f"every head needs more slots than its buffer of {buffer_size} (at least 1), not {sizes}.")
    check_shape("keys", keys, (batch, slots, head_dim), "[B, N, D]")
    check_shape("values", values, (batch, slots, values.shape[2]), "[B, N, Dv]")
    check_shape("new_value", new_value, (batch, heads, tokens, values.shape[2]), "[B, H, T, Dv]")
    check_shape("score", score, (batch, slots), "[B, N]")
    check_shape("positions", positions, (batch, slots), "[B, N]")
    _check_dtypes(
        (torch.float32, dict(score=score)),
        (torch.int64, dict(positions=positions)),
        (keys.dtype, dict(new_key=new_key)),
        (values.dtype, dict(new_value=new_value)),
    )
    check_same_device("keys", keys, values=values, score=score, positions=positions, new_key=new_key)
