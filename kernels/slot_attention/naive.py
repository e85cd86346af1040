"""Attention of one token over ragged slots in plain torch: the reference, and what runs without a fused kernel."""

import torch


def slot_attention(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    positions: torch.Tensor,
    head_offsets: tuple[int, ...],
    *,
    scale: float,
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,
    received: torch.Tensor | None = None,
) -> torch.Tensor:
    """Arguments and result as in the package's `slot_attention`; the equation, head by head, in fp32."""
    batch, query_heads = query.shape[:2]
    heads = len(head_offsets) - 1
    grouped = query.view(batch, heads, query_heads // heads, -1)  # [B, H, G, D]
    sink_logits = None if sinks is None else sinks.float().view(heads, -1, 1)  # [H, G, 1]
    outputs = []
    for head in range(heads):
        own = slice(head_offsets[head], head_offsets[head + 1])
        logits = grouped[:, head].float() @ keys[:, own].float().transpose(1, 2) * scale  # [B, G, S]
        if softcap is not None:
            logits = softcap * torch.tanh(logits / softcap)
        empty = (positions[:, own] < 0)[:, None]
        logits = logits.masked_fill(empty, float("-inf"))
        if sink_logits is not None:
            logits = torch.cat([logits, sink_logits[head].expand(batch, -1, -1)], dim=2)
        # a head that holds nothing has no softmax; its output is 0
        weights = logits.softmax(dim=2)[..., : own.stop - own.start].masked_fill(empty, 0.0)
        outputs.append(weights @ values[:, own].float())
        if received is not None:
            received[:, own] = weights.sum(1)
    return torch.cat(outputs, dim=1)[:, :, None].to(query.dtype)  # [B, HQ, 1, Dv]


def entry_weights(
    query: torch.Tensor,
    keys: torch.Tensor,
    visible: torch.Tensor,
    *,
    scale: float,
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,
) -> torch.Tensor:
    """Arguments and result as in the package's `entry_weights`."""
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
