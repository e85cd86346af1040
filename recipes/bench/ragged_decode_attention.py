"""Time of ragged_decode_attention for one token of one layer, HQ 32 on H 8 of D 128 in bf16, by default.

    python recipes/bench/ragged_decode_attention.py

Layers with slots of their own, more than the cache of the device holds, are captured in one CUDA graph, and the time
is a replay's divided by their number. Rivals on the same inputs: scaled_dot_product_attention over slots laid out by
head (equal budgets only, every slot valid), and the equation in plain torch, captured. The error is the largest
against the equation in fp64 over the standard deviation of the output. The limit is keys and values read once at the
measured bandwidth.
"""

import argparse
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from itertools import accumulate
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F

from retention_gates.kernels.ragged_decode_attention import Run, fused, naive, parts
from retention_gates.kernels.softmax import Softmax
from retention_gates.recipes.bench.gate_evict import ragged
from retention_gates.recipes.bench.harness import Measurement, bandwidth_gbs, replayed_us, report

LEAST_BYTES = 256 * 2**20  # read by all layers of a graph, several times the cache of the device


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 4, 32, 256])
    parser.add_argument("--memory-size", type=int, nargs="+", default=[1024])
    parser.add_argument("--heads", type=int, default=8)
    parser.add_argument("--group", type=int, default=4)
    parser.add_argument("--head-dim", type=int, default=128)
    parser.add_argument("--run", type=int, default=8, help="tokens of a short run, timed beside one token")
    parser.add_argument("--sweep", action="store_true", help="tiles and numbers of programs as well")
    options = parser.parse_args()
    bandwidth = bandwidth_gbs()
    measured = []
    for batch in options.batch:
        for size in options.memory_size:
            for kind, sizes in (
                ("uniform", [size] * options.heads),
                ("ragged", ragged(size, options.heads)),
            ):
                layers = Layers(batch, sizes, options.group, options.head_dim)
                heads, dim = options.heads, options.head_dim
                case = f"B={batch} HQ={heads * options.group} H={heads} D={dim} M={size} {kind}"
                limit = layers.bytes_each / bandwidth / 1e3  # us
                measured += compare(layers, case, limit, kind == "uniform", options.run)
                if options.sweep and kind == "uniform":
                    report("ragged_decode_attention_sweep", sweep(layers, case, limit))
                del layers
    report("ragged_decode_attention", measured)


class Layers:
    """Inputs of as many layers as overflow the cache."""

    def __init__(self, batch: int, sizes: list[int], group: int, dim: int):
        self.offsets = tuple(accumulate((entries + 1 for entries in sizes), initial=0))
        slots, heads = self.offsets[-1], len(sizes)
        options: dict[str, Any] = dict(device="cuda", dtype=torch.bfloat16)
        self.bytes_each = 2 * batch * slots * dim * 2
        self.count = min(64, max(4, -(-LEAST_BYTES // self.bytes_each)))
        self.query = torch.randn(batch, heads * group, 1, dim, **options)
        self.slots = [
            (torch.randn(batch, slots, dim, **options), torch.randn(batch, slots, dim, **options))
            for _ in range(self.count)
        ]
        self.positions = torch.zeros(batch, slots, dtype=torch.int64, device="cuda")
        self.scale = dim**-0.5

    def ours(self, layer: int = 0, query: torch.Tensor | None = None, **more: Any) -> torch.Tensor:
        query = self.query if query is None else query
        return fused.ragged_decode_attention(
            query, *self.slots[layer], self.positions, self.offsets, Softmax(self.scale), **more
        )

    def plain(self, layer: int = 0) -> torch.Tensor:
        return naive.ragged_decode_attention(
            self.query, *self.slots[layer], self.positions, self.offsets, Softmax(self.scale)
        )

    def by_head(self, layer: int = 0) -> torch.Tensor:
        batch, query_heads, _, dim = self.query.shape
        heads = len(self.offsets) - 1
        keys, values = (x.view(batch, heads, -1, dim) for x in self.slots[layer])
        grouped = self.query.view(batch, heads, query_heads // heads, dim)
        # the query group as rows of one head, so that keys are read once
        return F.scaled_dot_product_attention(grouped, keys, values, scale=self.scale).view_as(self.query)

    def exact(self) -> torch.Tensor:
        """Of the first row, in fp64."""
        group = self.query.shape[1] // (len(self.offsets) - 1)
        keys, values = (x[0].double() for x in self.slots[0])
        outputs = []
        for head, (start, stop) in enumerate(zip(self.offsets, self.offsets[1:], strict=False)):
            query = self.query[0, head * group : (head + 1) * group, 0].double()
            outputs.append((query @ keys[start:stop].T * self.scale).softmax(1) @ values[start:stop])
        return torch.cat(outputs)


def compare(layers: Layers, case: str, limit: float, is_uniform: bool, run: int) -> list[Measurement]:
    exact = layers.exact()

    def error(output: torch.Tensor) -> float:
        return ((output[0, :, 0].double() - exact).abs().max() / exact.std()).item()

    batch, query_heads, _, dim = layers.query.shape
    heads = len(layers.offsets) - 1
    more = torch.randn(batch, query_heads, run, dim, device="cuda", dtype=torch.bfloat16)
    new = torch.randn(batch, heads, run, dim, device="cuda", dtype=torch.bfloat16)
    tokens = Run(new, new, torch.arange(run, device="cuda").expand(batch, -1))
    contenders: dict[str, Callable[..., torch.Tensor]] = {
        "ours": layers.ours,
        f"ours, a run of {run}": lambda layer=0: layers.ours(layer, more, run=tokens),
        "plain torch, captured": layers.plain,
    }
    if is_uniform:
        contenders["sdpa"] = layers.by_head
    measured = []
    for contender, function in contenders.items():
        difference = None if "run" in contender else error(function())
        if difference is not None and difference > 0.05:
            raise SystemExit(f"{contender}: {case}: an error of {difference} standard deviations")
        value, spread = replayed_us([partial(function, i) for i in range(layers.count)])
        measured.append(Measurement(case, contender, value, "us", spread, limit, error=difference))
    return measured


def sweep(layers: Layers, case: str, limit: float) -> list[Measurement]:
    """The default with some constants changed; a tile is slots, warps and stages."""
    expected, measured = layers.ours(), []
    tiles = ((32, 2, 2), (32, 2, 3), (32, 1, 2), (32, 4, 2), (64, 2, 1), (64, 4, 1), (64, 4, 3))
    changes: dict[str, list[tuple[Any, str, Any]]] = {
        "as it is": [],
        **{f"tile {' '.join(map(str, tile))}": [always(tile)] for tile in tiles},
        "x2": [(parts, "PROGRAMS", 2)],
        "x3, parts in 32s": [(parts, "PROGRAMS", 3), (fused, "block_for", lambda *_: 32), always((32, 2, 2))],
        "x8, parts in 32s": [(parts, "PROGRAMS", 8), (fused, "block_for", lambda *_: 32), always((32, 2, 1))],
        **{f"sum by {warps} warps": [(fused, "SUM_WARPS", warps)] for warps in (1, 2, 8)},
        "the sum begins late": [(fused, "SUM_BEGINS_EARLY", False)],
    }
    for name, changed in changes.items():
        with ExitStack() as stack:
            for owner, attribute, value in changed:
                stack.enter_context(mock.patch.object(owner, attribute, value))
            torch.testing.assert_close(layers.ours(), expected, rtol=0.02, atol=0.002)
            value, spread = replayed_us([partial(layers.ours, i) for i in range(layers.count)])
        measured.append(Measurement(case, f"ours, {name}", value, "us", spread, limit))
    with mock.patch.object(fused, "sum_parts", Nothing()):
        value, spread = replayed_us([partial(layers.ours, i) for i in range(layers.count)])
    return [*measured, Measurement(case, "ours, without the sum over parts", value, "us", spread, limit)]


def always(tile: tuple[int, int, int]) -> tuple[Any, str, Any]:
    return fused, "tile_for", lambda *_: fused.Tile(*tile)


class Nothing:
    """A kernel that is not launched."""

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        return lambda *_, **__: None


if __name__ == "__main__":
    main()
