"""Attention of one new token, or of a short run of them, over ragged slots. See README.md in this folder."""

from typing import NamedTuple

import torch

from retention_gates.kernels.checks import check_same_device, check_shape
from retention_gates.kernels.dispatch import use_cpu, use_fused
from retention_gates.kernels.ragged_decode_attention import cpu, naive
from retention_gates.kernels.softmax import Softmax

LONGEST_RUN = 16  # tokens


class Run(NamedTuple):
    """New tokens that have no slots yet."""

    key: torch.Tensor  # [B, H, n, D]
    value: torch.Tensor  # [B, H, n, Dv]
    positions: torch.Tensor  # int64 [B, n], -1 for padding


def ragged_decode_attention(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    positions: torch.Tensor,
    head_offsets: tuple[int, ...],
    softmax: Softmax,
    *,
    received: torch.Tensor | None = None,
    run: Run | None = None,
) -> torch.Tensor:
    """Plain softmax attention of one query per row over the slots its KV head holds, [B, HQ, 1, Dv] in query's dtype.

    With a run, of its n queries over the slots and, each up to its own token, over the run: [B, HQ, n, Dv].

    Args:
        query: [B, HQ, 1, D], or [B, HQ, n, D] with a run; query head h reads the slots of KV head h // G.
        keys: [B, N, D]; values: [B, N, Dv]. Empty slots may hold anything finite.
        positions: int64 [B, N], -1 for an empty slot. A head that holds nothing gives 0.
        head_offsets: H + 1 integers; head h owns the slots head_offsets[h]:head_offsets[h + 1].
        softmax: how logits become weights.
        received: fp32 [B, N] or None; is overwritten with what each slot received, the softmax weights summed over
            the query heads of its KV head, 0 for empty slots. Not with a run.
        run: keys, values and positions of up to 16 new tokens, which are not in the slots. None: the token is there.

    Raises:
        ValueError: for shapes, dtypes or devices that don't go together.
    """
    heads, slots = len(head_offsets) - 1, head_offsets[-1]
    if query.ndim != 4 or (run is None and query.shape[2] != 1):
        raise ValueError(f"query must be one token, [B, HQ, 1, D], not {list(query.shape)}, or come with its run.")
    batch, query_heads, _tokens, head_dim = query.shape
    if heads < 1 or query_heads == 0 or query_heads % heads:
        raise ValueError(f"query has {query_heads} heads, which is no multiple of the {heads} KV heads.")
    check_shape("keys", keys, (batch, slots, head_dim), "[B, N, D]")
    check_shape("values", values, (batch, slots, values.shape[-1]), "[B, N, Dv]")
    check_shape("positions", positions, (batch, slots), "[B, N]")
    for name, tensor in (("keys", keys), ("values", values)):
        if tensor.dtype != query.dtype:
            raise ValueError(f"{name} is {tensor.dtype} and query {query.dtype}: they must share one floating dtype.")
    softmax.check(query_heads)
    if received is not None:
        check_shape("received", received, (batch, slots), "[B, N]")
        if received.dtype != torch.float32:
            raise ValueError(f"received must be torch.float32, not {received.dtype}.")
    if run is not None:
        _check_run(run, query, heads, values.shape[2], received)
        check_same_device("query", query, new_key=run.key, new_value=run.value, new_positions=run.positions)
    check_same_device("query", query, keys=keys, values=values, positions=positions, received=received)
    check_same_device("query", query, sinks=softmax.sinks)
    form = naive.ragged_decode_attention
    if use_fused("ragged_decode_attention", query):
        from retention_gates.kernels.ragged_decode_attention.fused import ragged_decode_attention as form
    elif use_cpu(query):
        form = cpu.ragged_decode_attention
    return form(
        query,
        keys,
        values,
        positions,
        head_offsets,
        softmax,
        received=received,
        run=run,
    )


def _check_run(run: Run, query: torch.Tensor, heads: int, value_dim: int, received: torch.Tensor | None) -> None:
    batch, _, tokens, head_dim = query.shape
    if not 1 <= tokens <= LONGEST_RUN:
        raise ValueError(f"query has {tokens} tokens and a run has 1 to {LONGEST_RUN}.")
    if received is not None:
        raise ValueError("received is for one token without a run: entry_weights gives it for several.")
    check_shape("the run's key", run.key, (batch, heads, tokens, head_dim), "[B, H, n, D]")
    check_shape("the run's value", run.value, (batch, heads, tokens, value_dim), "[B, H, n, Dv]")
    check_shape("the run's positions", run.positions, (batch, tokens), "[B, n]")
    for name, tensor in (("key", run.key), ("value", run.value)):
        if tensor.dtype != query.dtype:
            raise ValueError(f"the run's {name} is {tensor.dtype} and query {query.dtype}: they must share one dtype.")


def entry_weights(
    query: torch.Tensor,
    keys: torch.Tensor,
    visible: torch.Tensor,
    softmax: Softmax,
) -> torch.Tensor:
    """The attention that each entry receives from each of n queries, summed over its query group, fp32 [B, H, n, S].

    For queries that come several at a time, some at a time: it takes 4 * B * HQ * n * S bytes. A query that sees
    nothing gives 0.

    Args:
        query: [B, HQ, n, D]; query head h reads KV head h // G.
        keys: [B, H, S, D], one line per head.
        visible: bool [B, H, n, S] or what broadcasts to it, which entries a query sees.
        softmax: as for `ragged_decode_attention`.

    Raises:
        ValueError: for shapes or devices that don't go together.
    """
    if query.ndim != 4 or keys.ndim != 4 or visible.ndim != 4:
        raise ValueError(
            f"query, keys and visible must be [B, HQ, n, D], [B, H, S, D] and [B, H, n, S], not {list(query.shape)}, "
            f"{list(keys.shape)} and {list(visible.shape)}."
        )
    batch, query_heads, tokens, head_dim = query.shape
    heads, entries = keys.shape[1:3]
    check_shape("keys", keys, (batch, heads, entries, head_dim), "[B, H, S, D]")
    if query_heads == 0 or query_heads % heads:
        raise ValueError(f"query has {query_heads} heads, which is no multiple of the {heads} KV heads.")
    if any(n not in (1, size) for n, size in zip(visible.shape, (batch, heads, tokens, entries), strict=True)):
        raise ValueError(f"visible is {list(visible.shape)}, which is not [B, H, n, S].")
    softmax.check(query_heads)
    check_same_device("query", query, keys=keys, visible=visible, sinks=softmax.sinks)
    return naive.entry_weights(query, keys, visible, softmax)
