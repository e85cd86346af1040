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
    run: tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None = None,
) -> torch.Tensor:
    """Arguments and result as in the package's `slot_attention`; the equation, head by head, in fp32."""
    batch, query_heads, tokens, _ = query.shape
    heads = len(head_offsets) - 1
    grouped = query.reshape(batch, heads, -1, query.shape[3])  # [B, H, G * n, D]
    sink_logits = None if sinks is None else sinks.float().view(heads, -1, 1).repeat_interleave(tokens, dim=1)
    outputs = []
    for head in range(heads):
        own = slice(head_offsets[head], head_offsets[head + 1])
        key, value = keys[:, own].float(), values[:, own].float()
        hidden = (positions[:, own] < 0)[:, None]  # [B, 1, S]
        if run is not None:
            key, value = (torch.cat([x, new[:, head].float()], 1) for x, new in zip((key, value), run, strict=False))
            hidden = torch.cat([hidden.expand(-1, tokens, -1), _hidden_in_run(run[2])], dim=2).repeat(
                1, query_heads // heads, 1
            )  # [B, G * n, S + n]
        logits = grouped[:, head].float() @ key.transpose(1, 2) * scale  # [B, G * n, S]
        if softcap is not None:
            logits = softcap * torch.tanh(logits / softcap)
        logits = logits.masked_fill(hidden, float("-inf"))
        if sink_logits is not None:
            logits = torch.cat([logits, sink_logits[head].expand(batch, -1, -1)], dim=2)
        # a query that sees nothing has no softmax; its output is 0
        weights = logits.softmax(dim=2)[..., : key.shape[1]].masked_fill(hidden, 0.0)
        outputs.append(weights @ value)
        if received is not None:
            received[:, own] = weights.sum(1)
    return torch.cat(outputs, dim=1).view(batch, query_heads, tokens, -1).to(query.dtype)


def _hidden_in_run(positions: torch.Tensor) -> torch.Tensor:
    """What each query of a run does not see of it, bool [B, n, n]: padding, and tokens after its own."""
    tokens = positions.shape[1]
    later = torch.ones(tokens, tokens, dtype=torch.bool, device=positions.device).triu(1)
    return later | (positions < 0)[:, None]


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
