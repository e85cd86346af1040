"""Attention whose keys fade with age. See README.md in this folder."""

import math
from typing import Any

import torch

from retention_gates.kernels.checks import check_document_ids, check_log_beta, check_same_device, check_shape
from retention_gates.kernels.dispatch import use_fused
from retention_gates.kernels.retention_attention import naive


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
    check_values: bool = True,
) -> torch.Tensor:
    """Causal attention in which a key loses log_beta of its logit with every step of age, [B, HQ, T, Dv].

    softmax_i(q_t k_i * scale + (t - i) * log_beta_i) v_i, i <= t (TRIM-KV, arXiv 2512.03324, eq. 3), bias and softmax
    in fp32, output in query's dtype. Differentiable in query, key, value, log_beta and sinks; nothing [T, T] is kept.

    Args:
        query: [B, HQ, T, D]; query head h reads KV head h // G.
        key: [B, H, T, D].
        value: [B, H, T, Dv].
        log_beta: fp32 [B, H, T], <= 0 per token.
        scale: what q k is multiplied with, above 0.
        document_ids: int64 [B, T], the same for the tokens of a document, which follow each other. A token sees its
            own document only; rows of padding (-1) give 0. None: all one.
        sliding_window: keys that a query sees at most, itself among them. None: all.
        eviction_times: int64 [B, H, T], the first query that does not see a key any more, as the op `eviction_times`
            gives it. None: never.
        softcap: logits become softcap * tanh(q k * scale / softcap) before the bias.
        sinks: [HQ], one more logit per query head in the softmax's denominator.
        gaussian: a key loses ((t - i) * log_beta_i)^2 of its logit instead: little while it is younger than
            1 / -log_beta, nearly all at twice that age. So it is more like a token that is held and then evicted.
        check_values: False trusts that log_beta is <= 0, as a logsigmoid is, and spares a wait for the device.

    Raises:
        ValueError: for shapes, dtypes or devices that don't go together, numbers outside their range, and, where the
            fused form runs, for a layout or head dim that it can't read.
    """
    check_log_beta(log_beta, values=check_values)
    check_document_ids(document_ids, log_beta)
    batch, heads, tokens = log_beta.shape
    for name, tensor in (("query", query), ("key", key), ("value", value)):
        if tensor.ndim != 4:
            raise ValueError(f"{name} must have 4 axes [B, heads, T, head dim], not shape {list(tensor.shape)}.")
        if tensor.dtype != query.dtype or not tensor.is_floating_point():
            raise ValueError(
                f"{name} is {tensor.dtype} and query {query.dtype}: query, key and value must share a floating dtype."
            )
    query_heads, head_dim = query.shape[1], query.shape[3]
    check_shape("query", query, (batch, query_heads, tokens, head_dim), "[B, HQ, T, D]")
    check_shape("key", key, (batch, heads, tokens, head_dim), "[B, H, T, D]")
    check_shape("value", value, (batch, heads, tokens, value.shape[3]), "[B, H, T, Dv]")
    if query_heads == 0 or query_heads % heads:
        raise ValueError(f"query has {query_heads} heads, which is no multiple of the {heads} KV heads of key.")
    if not 0 < scale < math.inf:  # the fused form divides by it
        raise ValueError(f"scale must be a number above 0, not {scale}: negate query instead of scale.")
    if softcap is not None and not softcap > 0:
        raise ValueError(f"softcap must be above 0, not {softcap}: pass None for no cap.")
    if sinks is not None:
        check_shape("sinks", sinks, (query_heads,), "[HQ]")
    if sliding_window is not None and sliding_window < 1:
        raise ValueError(f"sliding_window must be at least 1 key, not {sliding_window}: pass None for no window.")
    if eviction_times is not None:
        check_shape("eviction_times", eviction_times, (batch, heads, tokens), "[B, H, T]")
        if eviction_times.dtype != torch.int64:
            raise ValueError(
                f"eviction_times must be torch.int64, not {eviction_times.dtype}: convert it with .long()."
            )
    others = {"document_ids": document_ids, "eviction_times": eviction_times, "sinks": sinks}
    check_same_device("query", query, key=key, value=value, log_beta=log_beta, **others)
    attend: Any = naive.retention_attention
    if use_fused("retention_attention", query):
        from retention_gates.kernels.retention_attention import fused  # needs Triton

        attend = fused.retention_attention
    return attend(
        query,
        key,
        value,
        log_beta,
        scale=scale,
        document_ids=document_ids,
        sliding_window=sliding_window,
        eviction_times=eviction_times,
        softcap=softcap,
        sinks=sinks,
        gaussian=gaussian,
    )
