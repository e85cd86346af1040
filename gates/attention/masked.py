"""Attention under a mask of its own for every KV head, for queries that come several at a time."""

import torch
import torch.nn.functional as F

from retention_gates.kernels.softmax import Softmax


def masked_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    visible: torch.Tensor,
    softmax: Softmax,
) -> torch.Tensor:
    """Softmax attention over the visible entries, [B, HQ, T, Dv] in query's dtype; a query that sees none gives 0.

    Args:
        query: [B, HQ, T, D]; key: [B, H, S, D]; value: [B, H, S, Dv].
        visible: bool, broadcastable to [B, H, T, S].
    """
    scale, softcap, sinks = softmax
    batch, query_heads, tokens, _ = query.shape
    heads, entries = key.shape[1:3]
    # KV heads go to the batch axis and the queries' group to the head axis: then neither keys nor masks are repeated
    grouped = query.reshape(batch * heads, query_heads // heads, tokens, -1)
    keys = key.reshape(batch * heads, 1, entries, -1).expand(-1, grouped.shape[1], -1, -1)
    values = value.reshape(batch * heads, 1, entries, -1).expand(-1, grouped.shape[1], -1, -1)
    mask = visible.expand(batch, heads, tokens, entries).reshape(batch * heads, 1, tokens, entries)
    blind = ~mask.any(-1, keepdim=True)
    if softmax.is_plain:
        # a row without any entry would be NaN
        output = F.scaled_dot_product_attention(grouped, keys, values, attn_mask=mask | blind, scale=scale)
    else:
        logits = grouped.float() @ keys.float().transpose(-1, -2) * scale  # [B * H, G, T, S]
        if softcap is not None:
            logits = softcap * torch.tanh(logits / softcap)
        logits = logits.masked_fill(~(mask | blind), float("-inf"))
        if sinks is not None:
            sink = sinks.float().view(heads, -1, 1, 1).repeat(batch, 1, tokens, 1)
            logits = torch.cat([logits, sink], dim=-1)
        weights = logits.softmax(dim=-1)[..., :entries]
        output = (weights @ values.float()).to(query.dtype)
    return output.masked_fill(blind, 0.0).reshape(batch, query_heads, tokens, -1)
