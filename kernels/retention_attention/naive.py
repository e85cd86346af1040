"""Retention-gated attention in plain torch: the reference, and what runs where there is no fused kernel."""

import torch
from torch.utils.checkpoint import checkpoint

# Query rows handled at a time. On a CPU 64 to 256 take the same time within a third, and the largest tensor alive, the
# logits of one chunk, stays at B * HQ * 128 * T * 4 bytes: 4.7 MB for 9 heads and 1,024 tokens.
CHUNK_SIZE = 128


def retention_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    log_beta: torch.Tensor,
    *,
    scale: float,
    document_ids: torch.Tensor | None = None,
    sliding_window: int | None = None,
    eviction_times: torch.Tensor | None = None,
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,
    gaussian: bool = False,
    chunk_size: int = CHUNK_SIZE,
) -> torch.Tensor:
    """Attention whose keys fade with age, [B, HQ, T, Dv].

    Arguments as in the package's `retention_attention`; everything is computed in the dtype of log_beta.
    """
    inputs = (query, key, value, log_beta, sinks)
    differentiate = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in inputs)
    outputs = []
    for start in range(0, query.shape[2], chunk_size):
        chunk = slice(start, start + chunk_size)
        seen = slice(0, start + chunk_size)  # no row of the chunk looks further
        arguments = (
            query[:, :, chunk],
            key[:, :, seen],
            value[:, :, seen],
            log_beta[:, :, seen],
            scale,
            None if document_ids is None else document_ids[:, seen],
            sliding_window,
            None if eviction_times is None else eviction_times[:, :, seen],
            softcap,
            sinks,
            gaussian,
        )
        if differentiate:
            # so that backward computes the chunk's scores again, and no [T, T] is kept in pieces
            rows = checkpoint(_attend, *arguments, use_reentrant=False, preserve_rng_state=False)
        else:
            rows = _attend(*arguments)
        outputs.append(rows)
    return torch.cat(outputs, dim=2)


def _attend(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    log_beta: torch.Tensor,
    scale: float,
    document_ids: torch.Tensor | None,
    sliding_window: int | None,
    eviction_times: torch.Tensor | None,
    softcap: float | None,
    sinks: torch.Tensor | None,
    gaussian: bool,
) -> torch.Tensor:
    """Output [B, HQ, R, Dv] of the last R of S positions; query is [B, HQ, R, D], key, value and log_beta have S."""
    batch, query_heads, rows, _ = query.shape
    heads, seen = key.shape[1], key.shape[2]
    dtype = log_beta.dtype
    position = torch.arange(seen, device=query.device)
    age = position[-rows:, None] - position  # [R, S]
    hidden = age < 0
    if sliding_window is not None:
        hidden = hidden | (age >= sliding_window)
    if document_ids is not None:
        # padding is a document of its own here, so that no row is without a key and none becomes NaN
        hidden = hidden | (document_ids[:, None, None, -rows:, None] != document_ids[:, None, None, None, :])
    blind = None
    if eviction_times is not None:
        hidden = hidden | (position[-rows:, None] >= eviction_times[:, :, None, None, :])  # [B, H, 1, R, S]
        blind = hidden.all(-1, keepdim=True)
        hidden = hidden & ~blind  # a row without a key would be NaN; its output becomes 0 below

    with torch.autocast(query.device.type, enabled=False):  # which would round the logits to 16 bits
        grouped = (query.to(dtype) * scale).reshape(batch, heads, -1, query.shape[-1])  # [B, H, G * R, D]
        logits = (grouped @ key.to(dtype).mT).view(batch, heads, -1, rows, seen)  # [B, H, G, R, S]
        if softcap is not None:
            logits = softcap * torch.tanh(logits / softcap)
        fade = age * log_beta[:, :, None, :]  # [B, H, R, S]
        logits = logits + (-fade.square() if gaussian else fade)[:, :, None]
        logits = logits.masked_fill(hidden, float("-inf"))
        if sinks is None:
            weights = logits.softmax(-1)
        else:
            sink = sinks.to(dtype).view(1, heads, -1, 1, 1).expand(*logits.shape[:-1], 1)
            weights = torch.cat([logits, sink], dim=-1).softmax(-1)[..., :-1]
        if blind is not None:
            weights = weights.masked_fill(blind, 0.0)
        output = weights.reshape(batch, heads, -1, seen) @ value.to(dtype)
    output = output.view(batch, query_heads, rows, -1).to(query.dtype)
    if document_ids is not None:
        output = output.masked_fill(document_ids[:, None, -rows:, None] < 0, 0.0)
    return output
