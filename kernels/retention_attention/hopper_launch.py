"""Launches the Hopper kernels, and knows what they take."""

from functools import cache

import torch
import triton
from torch import Tensor
from triton import cdiv
from triton.experimental.gluon.language import NVMMASharedLayout, bfloat16, float16
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from retention_gates.kernels.retention_attention.hopper_backward import (
    attention_backward_keys,
    attention_backward_queries,
)
from retention_gates.kernels.retention_attention.hopper_forward import attention_forward

ROWS, COLUMNS, QUERIES = 128, 128, 64  # of the square tiles, and queries at a time in the pass for keys
WARPS = 8
STAGES = 3
TYPES = {torch.bfloat16: bfloat16, torch.float16: float16}
VERSIONS = ((3, 6), (3, 8))  # of Triton, first and last whose Gluon these kernels were compiled with


def takes(query: Tensor, block_dim: int, block_value: int, softcap: float | None, until: Tensor | None) -> bool:
    """Whether the Hopper kernels can do this case; the others do every case."""
    plain = softcap is None and until is None and query.dtype in TYPES
    return plain and {block_dim, block_value} <= {64, 128} and query.is_cuda and _is_hopper(query.device)


@cache
def _is_hopper(device: torch.device) -> bool:
    version = tuple(int(part) for part in triton.__version__.split(".")[:2])
    return torch.cuda.get_device_capability(device) == (9, 0) and VERSIONS[0] <= version <= VERSIONS[1]


def forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    output: Tensor,
    log_beta: Tensor,
    lse: Tensor,
    sinks: Tensor | None,
    first: Tensor | None,
    qk_scale: float,
    block_dim: int,
    block_value: int,
) -> None:
    batch, query_heads, tokens, _ = query.shape
    attention_forward[batch * query_heads, cdiv(tokens, ROWS)](
        _descriptor(query, ROWS // 2, block_dim),
        _descriptor(key, COLUMNS, block_dim),
        _descriptor(value, COLUMNS, block_value),
        _descriptor(output, ROWS // 2, block_value),
        log_beta,
        lse,
        lse if sinks is None else sinks,
        lse if first is None else first,
        tokens,
        lse.shape[2],
        qk_scale,
        HQ=query_heads,
        G=query_heads // key.shape[1],
        BD=block_dim,
        BDV=block_value,
        BM=ROWS // 2,
        BN=COLUMNS,
        SPANS=first is not None,
        HAS_SINKS=sinks is not None,
        num_warps=WARPS // 2,
    )


def backward_keys(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    gradient: Tensor,
    d_key: Tensor,
    d_value: Tensor,
    d_log_beta: Tensor,
    log_beta: Tensor,
    lse: Tensor,
    delta: Tensor,
    last: Tensor | None,
    scale: float,
    qk_scale: float,
    block_dim: int,
    block_value: int,
    needs_key_value: bool,
) -> None:
    batch, query_heads, tokens, _ = query.shape
    heads = key.shape[1]
    attention_backward_keys[batch * heads, cdiv(tokens, COLUMNS)](
        _descriptor(query, QUERIES, block_dim),
        _descriptor(key, COLUMNS // 2, block_dim),
        _descriptor(value, COLUMNS // 2, block_value),
        _descriptor(gradient, QUERIES, block_value),
        _descriptor(d_key, COLUMNS // 2, block_dim),
        _descriptor(d_value, COLUMNS // 2, block_value),
        d_log_beta,
        log_beta,
        lse,
        delta,
        lse if last is None else last,
        tokens,
        lse.shape[2],
        scale,
        qk_scale,
        HQ=query_heads,
        G=query_heads // heads,
        BD=block_dim,
        BDV=block_value,
        BM=QUERIES,
        BN=COLUMNS // 2,
        STAGES=STAGES,
        LIMITED=last is not None,
        NEEDS_KV=needs_key_value,
        num_warps=WARPS // 2,
    )


def backward_queries(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    gradient: Tensor,
    d_query: Tensor,
    log_beta: Tensor,
    lse: Tensor,
    delta: Tensor,
    first: Tensor | None,
    scale: float,
    qk_scale: float,
    block_dim: int,
    block_value: int,
) -> None:
    batch, query_heads, tokens, _ = query.shape
    attention_backward_queries[batch * query_heads, cdiv(tokens, ROWS)](
        _descriptor(query, ROWS // 2, block_dim),
        _descriptor(key, QUERIES, block_dim),
        _descriptor(value, QUERIES, block_value),
        _descriptor(gradient, ROWS // 2, block_value),
        _descriptor(d_query, ROWS // 2, block_dim),
        log_beta,
        lse,
        delta,
        lse if first is None else first,
        tokens,
        lse.shape[2],
        scale,
        qk_scale,
        HQ=query_heads,
        G=query_heads // key.shape[1],
        BD=block_dim,
        BDV=block_value,
        BM=ROWS // 2,
        BN=QUERIES,
        STAGES=STAGES,
        SPANS=first is not None,
        num_warps=WARPS // 2,
    )


def _descriptor(tensor: Tensor, rows: int, columns: int) -> TensorDescriptor:
    # an axis of length 1 may have any stride in torch, but not here
    strides = [stride if length > 1 else columns for stride, length in zip(tensor.stride(), tensor.shape, strict=True)]
    block = [1, 1, rows, columns]
    layout = NVMMASharedLayout.get_default_for(block, TYPES[tensor.dtype])
    return TensorDescriptor(tensor, list(tensor.shape), strides[:3] + [1], block, layout)
