"""The fused forms: their launches, and the op that torch.compile and autograd see. See README.md in this folder."""

from typing import Any

import torch
import triton

from retention_gates.kernels.dispatch import on_own_device
from retention_gates.kernels.retention_sum import direct, states
from retention_gates.kernels.retention_sum.nodes import Nodes, Settings, nodes_for

# Tokens: as fast as the exact form there, twice as fast at 1,024 (H100, recipes/bench/retention_sum.py).
LINEAR_FROM = 512
SETTINGS = Settings()
UNROLL = 8


def retention_sum(log_beta: torch.Tensor, document_ids: torch.Tensor | None, *, over_heads: bool) -> torch.Tensor:
    """Retained mass [B, H, T], or over heads [B, T]; the form is chosen by length. Arguments are checked already."""
    return _op(log_beta, document_ids, over_heads, log_beta.shape[-1] >= LINEAR_FROM)


@torch.library.custom_op("retention_gates::retention_sum", mutates_args=())
@on_own_device
def _op(log_beta: torch.Tensor, document_ids: torch.Tensor | None, over_heads: bool, linear: bool) -> torch.Tensor:
    return forward(log_beta, document_ids, over_heads, linear, SETTINGS)


@torch.library.custom_op("retention_gates::retention_sum_backward", mutates_args=())
@on_own_device
def _backward_op(
    gradient: torch.Tensor, log_beta: torch.Tensor, document_ids: torch.Tensor | None, over_heads: bool, linear: bool
) -> torch.Tensor:
    return backward(gradient, log_beta, document_ids, over_heads, linear, SETTINGS)


@_op.register_fake
def _(log_beta: torch.Tensor, document_ids: torch.Tensor | None, over_heads: bool, linear: bool) -> torch.Tensor:
    batch, heads, tokens = log_beta.shape
    return log_beta.new_empty((batch, tokens) if over_heads else (batch, heads, tokens))


@_backward_op.register_fake
def _(
    gradient: torch.Tensor, log_beta: torch.Tensor, document_ids: torch.Tensor | None, over_heads: bool, linear: bool
) -> torch.Tensor:
    return log_beta.new_empty(log_beta.shape)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    log_beta, document_ids, ctx.over_heads, ctx.linear = inputs
    ctx.save_for_backward(log_beta, document_ids)


def _differentiate(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    log_beta, document_ids = ctx.saved_tensors
    return _backward_op(gradient, log_beta, document_ids, ctx.over_heads, ctx.linear), None, None, None


_op.register_autograd(_differentiate, setup_context=_keep)


def forward(
    log_beta: torch.Tensor,
    document_ids: torch.Tensor | None,
    over_heads: bool,
    linear: bool,
    settings: Settings,
) -> torch.Tensor:
    """Retained mass; `linear` says which form runs, `settings` how."""
    log_beta = log_beta.contiguous()
    batch, heads, tokens = log_beta.shape
    sums, rows = (batch, heads) if over_heads else (batch * heads, 1)
    packed, per_batch = document_ids is not None, sums // batch
    starts, _ = _bounds(document_ids) if document_ids is not None else (None, None)
    chunks = triton.cdiv(tokens, settings.chunk)
    state = decays = None
    count = 0
    if linear:
        nodes = _nodes(log_beta, settings)
        count, decays = nodes.count, nodes.decays
        groups = triton.cdiv(chunks, settings.project_chunks)
        splits, per_split = _splits(rows, sums * groups, settings)
        parts = log_beta.new_empty(splits, sums, chunks, count)
        states.project_tokens[(sums, groups, splits)](
            log_beta, starts, nodes.other_roots, nodes.scale, parts,
            tokens, chunks, rows, per_split, per_batch, nodes.intervals, *_map(nodes),
            PACKED=packed, PADDED_INTERVALS=triton.next_power_of_2(nodes.intervals),
            ORDER=nodes.order, CHUNK=settings.chunk, CHUNKS=settings.project_chunks, num_warps=settings.project_warps,
        )  # fmt: skip
        state = parts.sum(0) if splits > 1 else parts[0]
        states.scan_tokens[(sums, triton.cdiv(count, 32))](
            state, starts, nodes.decay, tokens, chunks, per_batch, count,
            PACKED=packed, CHUNK=settings.chunk, CHUNKS=settings.scan_chunks,
            num_warps=settings.scan_warps,
        )  # fmt: skip
    chunk, per_program, warps = _tiling(linear, settings)
    blocks = triton.cdiv(tokens, chunk * per_program)
    splits, per_split = _splits(rows, sums * blocks, settings)
    parts = log_beta.new_empty(splits, sums, tokens)
    direct.write_sums[(sums, blocks, splits)](
        log_beta, starts, state, decays, parts, tokens, chunks, rows, per_split, per_batch, count,
        FAR=linear, PACKED=packed, CHUNK=chunk, CHUNKS=per_program, UNROLL=UNROLL, num_warps=warps,
    )  # fmt: skip
    total = parts.sum(0) if splits > 1 else parts[0]
    return total if over_heads else total.view(batch, heads, tokens)


def backward(
    gradient: torch.Tensor,
    log_beta: torch.Tensor,
    document_ids: torch.Tensor | None,
    over_heads: bool,
    linear: bool,
    settings: Settings,
) -> torch.Tensor:
    """d log_beta [B, H, T] for the gradient of what `forward` gives."""
    log_beta, gradient = log_beta.contiguous(), gradient.contiguous()
    batch, heads, tokens = log_beta.shape
    sums, rows = (batch, heads) if over_heads else (batch * heads, 1)
    packed, per_batch = document_ids is not None, sums // batch
    starts, ends = _bounds(document_ids) if document_ids is not None else (None, None)
    chunks = triton.cdiv(tokens, settings.chunk)
    nodes = _nodes(log_beta, settings)
    state = aged_state = None
    if linear:
        state, aged_state = log_beta.new_empty(2, sums, chunks, nodes.count)
        states.project_gradients[(sums, triton.cdiv(chunks, settings.chunks))](
            gradient, starts, nodes.decays, state, aged_state, tokens, chunks, per_batch, nodes.count,
            PACKED=packed, CHUNK=settings.chunk, CHUNKS=settings.chunks, num_warps=settings.warps,
        )  # fmt: skip
        states.scan_gradients[(sums, triton.cdiv(nodes.count, 32))](
            state, aged_state, starts, nodes.decay, tokens, chunks, per_batch, nodes.count,
            PACKED=packed, CHUNK=settings.chunk, CHUNKS=settings.scan_chunks,
            num_warps=settings.scan_warps,
        )  # fmt: skip
    chunk, per_program, warps = _tiling(linear, settings)
    out = torch.empty_like(log_beta)
    direct.write_gradients[(batch * heads, triton.cdiv(tokens, chunk * per_program))](
        log_beta, ends, gradient, state, aged_state, out,
        tokens, chunks, rows, per_batch, nodes.intervals, *_map(nodes),
        FAR=linear, PACKED=packed, ORDER=nodes.order, ROOTS=nodes.roots, SCALES=nodes.scales,
        CHUNK=chunk, CHUNKS=per_program, UNROLL=UNROLL, num_warps=warps,
    )  # fmt: skip
    return out


def _bounds(document_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """First position of every token's document and the one after its last, int32 [B, T]; T and 0 for padding."""
    batch, tokens = document_ids.shape
    count = document_ids.numel()
    is_first = torch.ones_like(document_ids, dtype=torch.bool)
    is_first[:, 1:] = document_ids[:, 1:] != document_ids[:, :-1]
    run = is_first.flatten().cumsum(0)  # from 1, over all rows
    position = torch.arange(count, device=run.device)
    firsts = torch.full((count + 2,), count, device=run.device)  # by run; place 0 takes what belongs nowhere
    firsts.scatter_(0, torch.where(is_first.flatten(), run, 0), position)
    row_start = position // tokens * tokens
    is_padding = document_ids < 0
    starts = (firsts[run] - row_start).view(batch, tokens).masked_fill(is_padding, tokens)
    ends = (firsts[run + 1] - row_start).view(batch, tokens).masked_fill(is_padding, 0)
    return starts.int(), ends.int()


def _nodes(log_beta: torch.Tensor, settings: Settings) -> Nodes:
    return nodes_for(max(triton.next_power_of_2(log_beta.shape[-1]), 1024), settings, log_beta.device)


def _map(nodes: Nodes) -> tuple[float, float, float, float]:
    return nodes.offset, nodes.lowest, nodes.per_octave, nodes.greatest


def _tiling(linear: bool, settings: Settings) -> tuple[int, int, int]:
    """Tokens of a chunk, chunks of a program, warps."""
    if linear:
        return settings.chunk, settings.chunks, settings.warps
    return settings.exact_tokens, 1, settings.exact_warps


def _splits(rows: int, programs: int, settings: Settings) -> tuple[int, int]:
    """Parts that the rows of a sum are split into, and rows of a part: more programs, each writing its own part."""
    wanted = min(rows, max(1, settings.programs // programs))
    per_split = triton.cdiv(rows, wanted)
    return triton.cdiv(rows, per_split), per_split
