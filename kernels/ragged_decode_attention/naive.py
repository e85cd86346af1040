"""Attention of one token over ragged slots in plain torch: the reference, and what runs without a fused kernel."""

from itertools import pairwise

import torch

from retention_gates.kernels.softmax import Softmax


def ragged_decode_attention(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    positions: torch.Tensor,
    head_offsets: tuple[int, ...],
    softmax: Softmax,
    *,
    received: torch.Tensor | None = None,
    run: tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None = None,
) -> torch.Tensor:
    """Arguments and result as in the package's `ragged_decode_attention`; in fp32, equal heads at once."""
    scale, softcap, sinks = softmax
    batch, query_heads, tokens, _ = query.shape
    heads = len(head_offsets) - 1
    grouped = query.reshape(batch, heads, -1, query.shape[3])  # [B, H, G * n, D]
    sink_logits = None if sinks is None else sinks.float().view(heads, -1, 1).repeat_interleave(tokens, dim=1)
    outputs = []
    for first, last in equal_heads(head_offsets):
        own, shape = slice(head_offsets[first], head_offsets[last]), (last - first, -1)
        key, value = (x[:, own].unflatten(1, shape).float() for x in (keys, values))  # [B, h, S, D]
        hidden = (positions[:, own].unflatten(1, shape) < 0)[:, :, None]  # [B, h, 1, S]
        if run is not None:
            key, value = (
                torch.cat([x, new[:, first:last].float()], 2) for x, new in zip((key, value), run, strict=False)
            )
            in_run = _hidden_in_run(run[2])[:, None].expand(-1, last - first, -1, -1)
            hidden = torch.cat([hidden.expand(-1, -1, tokens, -1), in_run], dim=3).repeat(
                1, 1, query_heads // heads, 1
            )  # [B, h, G * n, S + n]
        logits = grouped[:, first:last].float() @ key.transpose(2, 3) * scale  # [B, h, G * n, S]
        if softcap is not None:
            logits = softcap * torch.tanh(logits / softcap)
        logits = logits.masked_fill(hidden, float("-inf"))
        if sink_logits is not None:
            logits = torch.cat([logits, sink_logits[first:last].expand(batch, -1, -1, -1)], dim=3)
        # a query that sees nothing has no softmax; its output is 0
        weights = logits.softmax(dim=3)[..., : key.shape[2]].masked_fill(hidden, 0.0)
        outputs.append(weights @ value)
        if received is not None:
            received[:, own] = weights.sum(2).flatten(1)
    return torch.cat(outputs, dim=1).view(batch, query_heads, tokens, -1).to(query.dtype)


def equal_heads(head_offsets: tuple[int, ...]) -> list[tuple[int, int]]:
    """First and last + 1 of the heads beside each other that have as many slots."""
    sizes = [stop - start for start, stop in pairwise(head_offsets)]
    begins = [head for head in range(len(sizes)) if head == 0 or sizes[head] != sizes[head - 1]]
    return list(pairwise([*begins, len(sizes)]))


def _hidden_in_run(positions: torch.Tensor) -> torch.Tensor:
    """Returns what is hidden in a run, bool [B, n, n]: from each query, padding and the tokens after its own."""
    tokens = positions.shape[1]
    later = torch.ones(tokens, tokens, dtype=torch.bool, device=positions.device).triu(1)
    return later | (positions < 0)[:, None]


def entry_weights(
    query: torch.Tensor,
    keys: torch.Tensor,
    visible: torch.Tensor,
    softmax: Softmax,
) -> torch.Tensor:
    """Arguments and result as in the package's `entry_weights`."""
    scale, softcap, sinks = softmax
    batch, query_heads, tokens, _ = query.shape
    heads, entries = keys.shape[1:3]
    grouped = query.reshape(batch * heads, -1, query.shape[3]).float()  # [B * H, G * n, D]
    logits = (grouped @ keys.reshape(batch * heads, entries, -1).float().transpose(1, 2)).mul_(scale)
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    logits = logits.view(batch, heads, query_heads // heads, tokens, entries)
    hidden = ~visible
    logits = logits.masked_fill_(hidden[:, :, None], float("-inf"))
    if sinks is not None:
        sink = sinks.float().view(heads, -1, 1, 1).expand(*logits.shape[:4], 1)
        logits = torch.cat([logits, sink], dim=4)
    # a query that sees nothing has no softmax
    return logits.softmax(dim=4)[..., :entries].sum(2).masked_fill_(hidden, 0.0)
