"""The fixed rates that a decay of any rate is interpolated from, and the table of launch parameters. See README.md."""

import math
from dataclasses import dataclass
from functools import lru_cache

import torch

FAR_EXPONENT = 20.0  # a token that has decayed by more than exp(-20) = 2e-9 when the far sum begins is left out of it
SMALLEST = 2.0  # the rate, times T, that stands for "hardly decays": below it, intervals grow no finer


@dataclass(frozen=True)
class Settings:
    """The settings that can be tuned. The accuracy depends on the first three, the speed on all."""

    chunk: int = 32  # tokens; ages up to once or twice this are summed exactly, term by term
    order: int = 8  # nodes of an interval of rates, a power of 2
    interval: float = 0.72  # its greatest width, in nats of the rate
    chunks: int = 16  # per program, where they are rows of a matrix product: a power of 2, at least 16
    warps: int = 4
    exact_tokens: int = 256  # tokens per program of the exact form, a power of 2
    exact_warps: int = 4
    project_chunks: int = 4  # chunks per program that projects tokens on nodes
    project_warps: int = 1
    scan_chunks: int = 32  # chunks scanned at a time, a power of 2
    scan_warps: int = 4
    programs: int = 1024  # where rows are summed, they are split between programs until there are this many


@dataclass(frozen=True)
class Nodes:
    """Chebyshev nodes on intervals of equal width in log(rate + offset), from rate 0 up to `greatest`."""

    intervals: int
    order: int
    offset: float
    greatest: float  # rates above it have decayed before the far sum begins
    lowest: float  # log2 of the first interval's start
    per_octave: float  # intervals per unit of log2
    roots: tuple[float, ...]  # [order] Chebyshev nodes on [-1, 1]
    other_roots: torch.Tensor  # fp32 [order - 1, order]: the nodes but one's own
    scale: torch.Tensor  # fp32 [order]: 1 / the product of the distances to them
    scales: tuple[float, ...]
    decay: torch.Tensor  # fp64 [nodes]: over one chunk
    decays: torch.Tensor  # fp32 [nodes, 2 chunk + 1]: by age

    @property
    def count(self) -> int:
        return self.intervals * self.order


@lru_cache(maxsize=64)
def nodes_for(tokens: int, settings: Settings, device: torch.device) -> Nodes:
    """The nodes for sums over at most `tokens` tokens, computed in fp64; pass a power of two, so that few are kept."""
    offset = SMALLEST / tokens
    greatest = FAR_EXPONENT / (settings.chunk + 1)
    width = math.log((greatest + offset) / offset)
    intervals = 2 * math.ceil(width / settings.interval / 2)  # even: 16 nodes of alignment at the least order
    order = settings.order
    roots = torch.cos(torch.pi * (2 * torch.arange(order, dtype=torch.float64) + 1) / (2 * order))
    distance = roots[:, None] - roots
    others = ~torch.eye(order, dtype=torch.bool)
    scale = 1 / torch.where(others, distance, 1).prod(1)
    place = torch.arange(intervals)[:, None] + (roots + 1) / 2  # in intervals from the first
    rates = (offset * torch.exp(place * (width / intervals)) - offset).flatten()
    ages = torch.arange(2 * settings.chunk + 1, dtype=torch.float64)
    return Nodes(
        intervals=intervals,
        order=order,
        offset=offset,
        greatest=greatest,
        lowest=math.log2(offset),
        per_octave=intervals / (width / math.log(2)),
        roots=tuple(roots.tolist()),
        other_roots=roots.expand(order, order)[others].view(order, order - 1).T.float().contiguous().to(device),
        scale=scale.float().to(device),
        scales=tuple(scale.tolist()),
        decay=torch.exp(-rates * settings.chunk).to(device),
        decays=torch.exp(-rates[:, None] * ages).float().contiguous().to(device),
    )
