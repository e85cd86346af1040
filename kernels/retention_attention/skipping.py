"""Lists the blocks of keys that can have any weight for each block of queries, for the kernels to walk through.

A weight is at most exp(scale |q| |k| + age log_beta), and the largest weight of a row at least that of the
token itself, which has no age. A block may be skipped if all its weights are below 2^-25 / T of the row's largest: not
even T of them together change a sum in the last bit that bf16 or fp16 keeps. Gates that forget make most blocks so.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton import cdiv
from triton.tools.tensor_descriptor import TensorDescriptor

from retention_gates.kernels.retention_attention.forward import capped, load_rows, load_vector

UNIT = 16  # queries or keys whose bounds are taken together; every tile is a multiple
NEGLIGIBLE = 2.0**-25
LEAST_TOKENS = 16_384  # at 8,192, trained gates skipped too little to pay for the lists
MOST_TOKENS = 2**15 * UNIT  # an index of a block has 16 bits


@triton.jit
def _bound_blocks(
    queries,
    keys,
    rates,  # [B * H, T], as in the forward pass
    FIRST,  # [B, T]
    QUERY_NORM,  # [B * H, units]: largest |q| of the unit's queries, over the group
    FLOOR,  # smallest q k of a token with itself, over the group
    KEY_NORM,  # largest |k|
    SLOWEST,  # largest rate
    T,
    softcap,
    H: tl.constexpr,
    G: tl.constexpr,
    BD: tl.constexpr,
    UNIT: tl.constexpr,
    SPANS: tl.constexpr,
    SOFTCAP: tl.constexpr,
):
    batch = tl.program_id(0) // H
    head = tl.program_id(0) % H
    start = tl.program_id(1) * UNIT
    t = start + tl.arange(0, UNIT)
    real = t < T
    if SPANS:
        real = tl.load(FIRST + batch.to(tl.int64) * T + t, mask=real, other=T) < T
    key = load_rows(keys, batch, head, start, UNIT, BD).to(tl.float32)
    query_norm = tl.zeros((UNIT,), tl.float32)
    own = tl.full((UNIT,), float("inf"), tl.float32)
    for g in range(G):
        query = load_rows(queries, batch, head * G + g, start, UNIT, BD).to(tl.float32)
        query_norm = tl.maximum(query_norm, tl.sum(query * query, 1))
        logit = tl.sum(query * key, 1)
        if SOFTCAP:
            logit = capped(logit, softcap)
        own = tl.minimum(own, logit)
    rate = load_vector(rates, tl.program_id(0), start, UNIT)
    unit = tl.program_id(0).to(tl.int64) * tl.num_programs(1) + tl.program_id(1)
    # padding neither sees nor is seen; a hair is added for what rounding takes off
    tl.store(QUERY_NORM + unit, tl.sqrt(tl.max(tl.where(real, query_norm, 0.0), 0)) * 1.0001)
    tl.store(FLOOR + unit, tl.min(tl.where(real, own, float("inf")), 0))
    tl.store(KEY_NORM + unit, tl.sqrt(tl.max(tl.where(real, tl.sum(key * key, 1), 0.0), 0)) * 1.0001)
    tl.store(SLOWEST + unit, tl.max(tl.where(real, rate, float("-inf")), 0))


@triton.jit
def _list_blocks(
    QUERY_NORM,  # [B * H, query blocks], and so on
    FLOOR,
    KEY_NORM,
    SLOWEST,
    LIMIT,  # [B, query blocks] first key that all of the block's queries see, or [B * H, key blocks] last such query
    LISTS,  # int16 [B * H, blocks, width]
    COUNTS,  # int32 [B * H, blocks]
    query_blocks,
    key_blocks,
    width,
    margin,
    H: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    LIMITED: tl.constexpr,
    FOR_KEYS: tl.constexpr,
    GAUSSIAN: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """Lists the blocks of keys before a block of queries, or the blocks of queries after a block of keys."""
    row = tl.program_id(0).to(tl.int64)
    block = tl.program_id(1)
    place = row * tl.num_programs(1) + block
    count = 0
    limit = 0
    if FOR_KEYS:
        first_other = tl.cdiv((block + 1) * BN, BM)
        end_other = query_blocks
        if LIMITED:
            end_other = tl.minimum(end_other, (tl.load(LIMIT + place) + 1) // BM)
        norm = tl.load(KEY_NORM + place)
        slowest = tl.load(SLOWEST + place)
    else:
        first_other = 0
        end_other = block * BM // BN
        if LIMITED:
            limit = tl.load(LIMIT + (row // H) * tl.num_programs(1) + block)
            first_other = tl.cdiv(limit, BN)
        norm = tl.load(QUERY_NORM + place)
        floor = tl.load(FLOOR + place)
    for chunk in range(first_other, end_other, CHUNK):
        other = chunk + tl.arange(0, CHUNK)
        there = other < end_other
        if FOR_KEYS:
            other_norm = tl.load(QUERY_NORM + row * query_blocks + other, mask=there, other=0.0)
            floor_here = tl.load(FLOOR + row * query_blocks + other, mask=there, other=0.0)
            least_age = (other * BM - ((block + 1) * BN - 1)).to(tl.float32)
            fade = least_age * least_age if GAUSSIAN else least_age
            most = norm * other_norm + fade * slowest
        else:
            other_norm = tl.load(KEY_NORM + row * key_blocks + other, mask=there, other=0.0)
            slowest_here = tl.load(SLOWEST + row * key_blocks + other, mask=there, other=0.0)
            floor_here = floor
            least_age = (block * BM - ((other + 1) * BN - 1)).to(tl.float32)
            fade = least_age * least_age if GAUSSIAN else least_age
            most = norm * other_norm + fade * slowest_here
        kept = there & (most >= floor_here - margin)
        index = count + tl.cumsum(kept.to(tl.int32), 0) - 1
        tl.store(LISTS + place * width + index, other.to(tl.int16), mask=kept)
        count += tl.sum(kept.to(tl.int32), 0)
    tl.store(COUNTS + place, count)


class Bounds:
    """The bounds of every block of queries and keys, and the lists that follow from them."""

    def __init__(
        self,
        query: TensorDescriptor,
        key: TensorDescriptor,
        rates: TensorDescriptor,
        first: Tensor | None,
        last: Tensor | None,
        scale: float,
        softcap: float | None,
        gaussian: bool,
    ):
        """The descriptors read UNIT rows at a time: [B, HQ, T, D], [B, H, T, D] and [B * H, T]."""
        batch, heads, tokens, _ = key.shape
        device = key.base.device
        self.heads, self.tokens, self.first, self.last, self.gaussian = heads, tokens, first, last, gaussian
        self.margin = (math.log(1 / NEGLIGIBLE) + math.log(tokens)) / scale
        units = cdiv(tokens, UNIT)
        self.query_norm, self.floor, self.key_norm, self.slowest = (
            torch.empty(batch * heads, units, dtype=torch.float32, device=device) for _ in range(4)
        )
        bounds = (self.query_norm, self.floor, self.key_norm, self.slowest)
        _bound_blocks[batch * heads, units](
            query, key, rates, bounds[0] if first is None else first, *bounds, tokens,
            1.0 if softcap is None else softcap / scale, H=heads, G=query.shape[1] // heads, BD=key.block_shape[3],
            UNIT=UNIT, SPANS=first is not None, SOFTCAP=softcap is not None,
        )  # fmt: skip

    def key_blocks(self, BM: int, BN: int) -> tuple[Tensor, Tensor]:
        """The whole blocks of keys that each block of BM queries visits, int16 [B * H, blocks, width]; and counts."""
        limit = None
        if self.first is not None:
            limit = _per_block(self.first, BM, largest=True, fill=self.tokens)
        return self._list(BM, BN, limit, for_keys=False)

    def query_blocks(self, BM: int, BN: int) -> tuple[Tensor, Tensor]:
        """The same for every block of BN keys: the whole blocks of queries to visit."""
        limit = None
        if self.last is not None:
            limit = _per_block(self.last, BN, largest=False, fill=self.tokens)
            limit = limit[:, None].expand(-1, self.heads, -1).contiguous()
        return self._list(BM, BN, limit, for_keys=True)

    def _list(self, BM: int, BN: int, limit: Tensor | None, *, for_keys: bool) -> tuple[Tensor, Tensor]:
        queries = [_per_block(self.query_norm, BM // UNIT, largest=True, fill=0.0)]
        queries += [_per_block(self.floor, BM // UNIT, largest=False, fill=math.inf)]
        keys = [_per_block(self.key_norm, BN // UNIT, largest=True, fill=0.0)]
        keys += [_per_block(self.slowest, BN // UNIT, largest=True, fill=-math.inf)]
        rows, query_blocks, key_blocks = len(self.floor), queries[0].shape[1], keys[0].shape[1]
        blocks, width = (key_blocks, query_blocks) if for_keys else (query_blocks, key_blocks)
        lists = torch.empty(rows, blocks, width, dtype=torch.int16, device=self.floor.device)
        counts = torch.empty(rows, blocks, dtype=torch.int32, device=self.floor.device)
        _list_blocks[rows, blocks](
            *queries, *keys, counts if limit is None else limit, lists, counts, query_blocks, key_blocks, width,
            self.margin, H=self.heads, BM=BM, BN=BN, LIMITED=limit is not None, FOR_KEYS=for_keys,
            GAUSSIAN=self.gaussian, CHUNK=256,
        )  # fmt: skip
        return lists, counts


def _per_block(values: Tensor, size: int, *, largest: bool, fill: float) -> Tensor:
    """Largest or smallest of every `size` values of the last axis, which is filled up with `fill`."""
    padded = torch.nn.functional.pad(values, (0, -values.shape[-1] % size), value=fill)
    blocks = padded.unflatten(-1, (-1, size))
    return blocks.amax(-1) if largest else blocks.amin(-1)
