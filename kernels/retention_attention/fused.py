"""Retention-gated attention as Triton kernels, registered as operators that torch.compile can call."""

import math
from typing import Any

import torch
from torch import Tensor
from triton import cdiv, next_power_of_2
from triton.tools.tensor_descriptor import TensorDescriptor

from retention_gates.kernels.dispatch import on_own_device
from retention_gates.kernels.retention_attention.backward import (
    attention_backward_keys,
    attention_backward_queries,
    output_times_gradient,
)
from retention_gates.kernels.retention_attention.forward import attention_forward
from retention_gates.kernels.retention_attention.skipping import LEAST_TOKENS, MOST_TOKENS, UNIT, Bounds
from retention_gates.kernels.retention_attention.spans import visible_spans
from retention_gates.kernels.retention_attention.tiles import LARGEST, Tiles, tiles_for

LOG2_E = math.log2(math.e)
# a weight of exactly 0 from the first step of age on, and times any age, or its square if gaussian, still finite
LOWEST_RATE = {False: -1e30, True: -1e24}
SMALLEST_BLOCK = 16  # the least that the matrix units take
LEAST_STRIDE = 16  # bytes: the copy engine's unit


def retention_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    log_beta: Tensor,
    *,
    scale: float,
    document_ids: Tensor | None = None,
    sliding_window: int | None = None,
    eviction_times: Tensor | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    gaussian: bool = False,
) -> Tensor:
    """Arguments and result as in the package's `retention_attention`."""
    for name, tensor in (("query", query), ("key", key), ("value", value)):
        _check_layout(name, tensor)
    spans = visible_spans(document_ids, sliding_window, (query.shape[0], query.shape[2]), query.device)
    first, last = (None, None) if spans is None else spans
    until = None if eviction_times is None else _until(eviction_times, document_ids)
    output, _ = torch.ops.retention_gates.retention_attention(
        query, key, value, log_beta, sinks, first, last, until, scale, softcap, gaussian
    )
    return output


def _until(eviction_times: Tensor, document_ids: Tensor | None) -> Tensor:
    """eviction_times as int32, at most T; 0 at padding, which a row that sees nothing else would take for a key."""
    until = eviction_times.clamp(max=eviction_times.shape[2]).int()
    return until if document_ids is None else until.masked_fill((document_ids < 0)[:, None], 0)


@torch.library.custom_op("retention_gates::retention_attention", mutates_args=())
@on_own_device
def _forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    log_beta: Tensor,
    sinks: Tensor | None,
    first: Tensor | None,
    last: Tensor | None,
    until: Tensor | None,
    scale: float,
    softcap: float | None,
    gaussian: bool,
) -> tuple[Tensor, Tensor]:
    """Output [B, HQ, T, Dv], and the log of the softmax's denominator over scale, inf where a query sees nothing.

    The latter is [B, HQ, T and up to 3 more].
    `first` and `last` are those of `visible_spans`, int32 [B, T]; `until` int32 [B, H, T].
    """
    batch, query_heads, tokens, _ = query.shape
    output, lse = _empty_output(query, value)
    block_dim, block_value, tiles, precision = _blocks(query, value)
    rates = _rates(log_beta, scale, last, gaussian)
    sinks = None if sinks is None else (sinks.float() / scale).contiguous()
    tile = tiles.forward
    bounds = _bounds(query, key, rates, first, last, until, scale, softcap, gaussian, block_dim)
    lists, counts = (lse, lse) if bounds is None else bounds.key_blocks(tile.BM, tile.BN)
    attention_forward[batch * query_heads, cdiv(tokens, tile.BM)](
        _descriptor(query, tile.BM, block_dim),
        _descriptor(key, tile.BN, block_dim),
        _descriptor(value, tile.BN, block_value),
        _descriptor(output, tile.BM, block_value),
        _vector_descriptor(rates, tokens, tile.BN),
        lse,
        lse if sinks is None else sinks,
        lse if first is None else first,
        lse if until is None else until,
        lists,
        counts,
        tokens,
        lse.shape[2],
        lists.shape[2],
        scale * LOG2_E,
        1.0 if softcap is None else softcap / scale,
        HQ=query_heads,
        G=query_heads // key.shape[1],
        BD=block_dim,
        BDV=block_value,
        BM=tile.BM,
        BN=tile.BN,
        STAGES=tile.stages,
        SPANS=first is not None,
        EVICTED=until is not None,
        SKIPPING=bounds is not None,
        SOFTCAP=softcap is not None,
        GAUSSIAN=gaussian,
        HAS_SINKS=sinks is not None,
        PRECISION=precision,
        num_warps=tile.warps,
    )
    return output, lse


@_forward.register_fake
def _(query: Tensor, key: Tensor, value: Tensor, *others: Any) -> tuple[Tensor, Tensor]:
    return _empty_output(query, value)


def _empty_output(query: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    batch, query_heads, tokens, _ = query.shape
    # tokens before heads in memory, as the output projection wants it
    output = query.new_empty(batch, tokens, query_heads, value.shape[3]).transpose(1, 2)
    return output, query.new_empty(batch, query_heads, _padded(tokens), dtype=torch.float32)


@torch.library.custom_op("retention_gates::retention_attention_backward", mutates_args=())
@on_own_device
def _backward(
    gradient: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    log_beta: Tensor,
    sinks: Tensor | None,
    first: Tensor | None,
    last: Tensor | None,
    until: Tensor | None,
    output: Tensor,
    lse: Tensor,
    scale: float,
    softcap: float | None,
    gaussian: bool,
    needs_query: bool,
    needs_key_value: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of query, key, value, log_beta and sinks; empty where not needed."""
    batch, query_heads, tokens, _ = query.shape
    heads = key.shape[1]
    if not _is_readable(gradient):
        gradient = gradient.contiguous()
    d_query, d_key, d_value, d_log_beta, d_sinks = _empty_gradients(
        query, key, value, log_beta, sinks, needs_query, needs_key_value
    )
    block_dim, block_value, tiles, precision = _blocks(query, value)
    delta = torch.empty_like(lse)
    output_times_gradient[batch * query_heads, cdiv(tokens, 64)](
        output, gradient, delta, *output.stride()[:3], *gradient.stride()[:3], tokens, lse.shape[2], value.shape[3],
        HQ=query_heads, BDV=block_value, BM=64,
    )  # fmt: skip
    rates = _rates(log_beta, scale, last, gaussian)
    numbers = (scale, scale * LOG2_E, 1.0 if softcap is None else softcap / scale)
    bounds = _bounds(query, key, rates, first, last, until, scale, softcap, gaussian, block_dim)
    shared: dict[str, Any] = {"HQ": query_heads, "G": query_heads // heads, "BD": block_dim, "BDV": block_value}
    shared |= {"SOFTCAP": softcap is not None, "GAUSSIAN": gaussian, "SKIPPING": bounds is not None}
    shared |= {"PRECISION": precision}

    latest = _latest(last, until, heads)
    written_key, written_value = (d_key, d_value) if needs_key_value else (key, value)
    tile = tiles.backward_keys
    lists, counts = (lse, lse) if bounds is None else bounds.query_blocks(tile.BM, tile.BN)
    attention_backward_keys[batch * heads, cdiv(tokens, tile.BN)](
        _descriptor(query, tile.BM, block_dim),
        _descriptor(key, tile.BN, block_dim),
        _descriptor(value, tile.BN, block_value),
        _descriptor(gradient, tile.BM, block_value),
        _descriptor(written_key, tile.BN, block_dim),
        _descriptor(written_value, tile.BN, block_value),
        d_log_beta,
        _vector_descriptor(rates, tokens, tile.BN),
        _vector_descriptor(lse, tokens, tile.BM),
        _vector_descriptor(delta, tokens, tile.BM),
        lse if latest is None else latest,
        lists,
        counts,
        tokens,
        lists.shape[2],
        *numbers,
        BM=tile.BM,
        BN=tile.BN,
        STAGES=tile.stages,
        LIMITED=latest is not None,
        NEEDS_KV=needs_key_value,
        num_warps=tile.warps,
        **shared,
    )
    if gaussian:
        d_log_beta *= -2 * log_beta  # of the rate, - log_beta^2
    if needs_query:
        tile = tiles.backward_queries
        lists, counts = (lse, lse) if bounds is None else bounds.key_blocks(tile.BM, tile.BN)
        attention_backward_queries[batch * query_heads, cdiv(tokens, tile.BM)](
            _descriptor(query, tile.BM, block_dim),
            _descriptor(key, tile.BN, block_dim),
            _descriptor(value, tile.BN, block_value),
            _descriptor(gradient, tile.BM, block_value),
            _descriptor(d_query, tile.BM, block_dim),
            _vector_descriptor(rates, tokens, tile.BN),
            _vector_descriptor(lse, tokens, tile.BM),
            _vector_descriptor(delta, tokens, tile.BM),
            lse if first is None else first,
            lse if until is None else until,
            lists,
            counts,
            tokens,
            lists.shape[2],
            *numbers,
            BM=tile.BM,
            BN=tile.BN,
            STAGES=tile.stages,
            SPANS=first is not None,
            EVICTED=until is not None,
            num_warps=tile.warps,
            **shared,
        )
    return d_query, d_key, d_value, d_log_beta, _sinks_gradient(sinks, d_sinks, lse, delta, scale, tokens)


def _sinks_gradient(
    sinks: Tensor | None, nothing: Tensor, lse: Tensor, delta: Tensor, scale: float, tokens: int
) -> Tensor:
    if sinks is None:
        return nothing
    # a sink's weight in each row's softmax, times what the row would gain if it fell
    weight = torch.exp(sinks.float()[None, :, None] - lse[..., :tokens] * scale)
    return -(weight * delta[..., :tokens]).sum((0, 2)).to(sinks.dtype)


@_backward.register_fake
def _(
    gradient: Tensor, query: Tensor, key: Tensor, value: Tensor, log_beta: Tensor, sinks: Tensor | None, *others: Any
) -> tuple[Tensor, ...]:
    *_, needs_query, needs_key_value = others
    return _empty_gradients(query, key, value, log_beta, sinks, needs_query, needs_key_value)


def _empty_gradients(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    log_beta: Tensor,
    sinks: Tensor | None,
    needs_query: bool,
    needs_key_value: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    nothing = query.new_empty(0)
    d_key, d_value = (torch.empty_like(key), torch.empty_like(value)) if needs_key_value else (nothing,) * 2
    return (
        torch.empty_like(query) if needs_query else nothing.clone(),
        d_key,
        d_value.clone() if d_value is d_key else d_value,
        torch.empty_like(log_beta, memory_format=torch.contiguous_format),
        nothing.clone() if sinks is None else torch.empty_like(sinks),
    )


def _keep_for_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    query, key, value, log_beta, sinks, first, last, until, ctx.scale, ctx.softcap, ctx.gaussian = inputs
    ctx.save_for_backward(query, key, value, log_beta, sinks, first, last, until, *output)
    ctx.mark_non_differentiable(output[1])


def _differentiate(ctx: Any, gradient: Tensor, _: Any) -> tuple[Tensor | None, ...]:
    needs = ctx.needs_input_grad
    *inputs, output, lse = ctx.saved_tensors
    d_query, d_key, d_value, d_log_beta, d_sinks = torch.ops.retention_gates.retention_attention_backward(
        gradient, *inputs, output, lse, ctx.scale, ctx.softcap, ctx.gaussian, needs[0], needs[1] or needs[2]
    )
    wanted = (d_query, d_key, d_value, d_log_beta, d_sinks)
    return *(grad if need else None for grad, need in zip(wanted, needs, strict=False)), *[None] * 6


_forward.register_autograd(_differentiate, setup_context=_keep_for_backward)


def _check_layout(name: str, tensor: Tensor) -> None:
    if tensor.shape[3] > LARGEST:
        raise ValueError(
            f"{name} has head dim {tensor.shape[3]}; the fused kernel takes up to {LARGEST}: set "
            "RETENTION_GATES_KERNELS=naive."
        )
    if tensor.dtype not in (torch.float16, torch.bfloat16, torch.float32):
        raise ValueError(
            f"{name} is {tensor.dtype}; the fused kernel takes float16, bfloat16 and float32: cast it, or set "
            "RETENTION_GATES_KERNELS=naive."
        )
    unit = LEAST_STRIDE // tensor.element_size()
    if tensor.shape[3] % unit:  # or what is allocated here, output or gradient, could not be written
        raise ValueError(
            f"{name} has head dim {tensor.shape[3]}; the fused kernel takes multiples of {unit} in {tensor.dtype}: "
            "pad it with zeros, or set RETENTION_GATES_KERNELS=naive."
        )
    if not _is_readable(tensor):
        raise ValueError(
            f"{name} has strides {tensor.stride()}; the fused kernel needs a last axis of stride 1, the others a "
            f"multiple of {LEAST_STRIDE} bytes, and an address that is one too: pass {name}.contiguous()."
        )


def _is_readable(tensor: Tensor) -> bool:
    """Whether the copy engine can read [B, heads, T, D] as it lies in memory."""
    size = tensor.element_size()
    aligned = all(
        stride * size % LEAST_STRIDE == 0 and stride > 0
        for stride, length in zip(tensor.stride()[:3], tensor.shape[:3], strict=True)
        if length > 1
    )
    base = 0 if torch.compiler.is_compiling() else tensor.data_ptr()
    return aligned and tensor.stride(3) == 1 and base % LEAST_STRIDE == 0


def _descriptor(tensor: Tensor, rows: int, columns: int) -> TensorDescriptor:
    # an axis of length 1 may have any stride in torch, but not here
    strides = [stride if length > 1 else columns for stride, length in zip(tensor.stride(), tensor.shape, strict=True)]
    return TensorDescriptor(tensor, list(tensor.shape), strides[:3] + [1], [1, 1, rows, columns])


def _padded(tokens: int) -> int:
    """The least length >= tokens at which rows of fp32 lie on multiples of 16 bytes, as the copy engine wants them."""
    return (tokens + 3) // 4 * 4


def _vector_descriptor(vectors: Tensor, tokens: int, count: int) -> TensorDescriptor:
    """Of contiguous [B, heads, padded T] as [B * heads, T], `count` numbers at a time."""
    rows = vectors.shape[0] * vectors.shape[1]
    return TensorDescriptor(vectors, [rows, tokens], [vectors.shape[2], 1], [1, count])


def _blocks(query: Tensor, value: Tensor) -> tuple[int, int, Tiles, str]:
    """Head dims rounded up to powers of two, tiles, and the precision of matrix products."""
    block_dim, block_value = (max(SMALLEST_BLOCK, next_power_of_2(x.shape[3])) for x in (query, value))
    size = query.element_size()
    return block_dim, block_value, tiles_for(max(block_dim, block_value), size), "ieee" if size == 4 else "tf32"


def _rates(log_beta: Tensor, scale: float, last: Tensor | None, gaussian: bool) -> Tensor:
    """The factor of age, or of its square if gaussian, over scale; [B, H, T, padded].

    Padding fades at once, so that no mask is needed where it lies inside.
    """
    batch, heads, tokens = log_beta.shape
    rates = log_beta.new_empty(batch, heads, _padded(tokens))
    inside, lowest = rates[..., :tokens], LOWEST_RATE[gaussian]
    torch.clamp((-log_beta.square() if gaussian else log_beta) / scale, min=lowest, out=inside)
    if last is not None:
        inside.masked_fill_((last < 0)[:, None], lowest)
    return rates


def _bounds(
    query: Tensor,
    key: Tensor,
    rates: Tensor,
    first: Tensor | None,
    last: Tensor | None,
    until: Tensor | None,
    scale: float,
    softcap: float | None,
    gaussian: bool,
    block_dim: int,
) -> Bounds | None:
    """Returns the lists by which the kernels skip blocks; None where skipping does not pay or is not possible."""
    tokens = key.shape[2]
    if until is not None or not LEAST_TOKENS <= tokens <= MOST_TOKENS:
        return None
    rows = (_descriptor(query, UNIT, block_dim), _descriptor(key, UNIT, block_dim))
    return Bounds(*rows, _vector_descriptor(rates, tokens, UNIT), first, last, scale, softcap, gaussian)


def _latest(last: Tensor | None, until: Tensor | None, heads: int) -> Tensor | None:
    """Last query that sees each key, int32 [B, H, T]; None if all later ones do."""
    if last is None:
        return None if until is None else until - 1
    per_head = last[:, None].expand(-1, heads, -1)
    return per_head.contiguous() if until is None else torch.minimum(per_head, until - 1)
