"""Time of the linear layers of one decoding step, in the shapes of Qwen3-4B, bf16.

    python recipes/bench/small_batch_linear.py --rows 1 4 16 32

Weights of their own for as many layers as overflow the cache of the device are read in one CUDA graph, and the time is
a replay's divided by their number. What a model does next with the results is part of it: the rival is F.linear, one
call per weight, and what comes next in calls of its own, as a model's layers do it. The error is the largest of the
last 64 outputs against fp64, over their standard deviation. The limit is every weight read once at the measured rate
of a copy.
"""

import argparse
from functools import partial
from typing import Any
from unittest.mock import patch

import torch

from retention_gates.kernels.small_batch_linear import fused, naive
from retention_gates.recipes.bench.harness import Measurement, bandwidth_gbs, replayed_us, report

LEAST_BYTES = 512 * 2**20  # read by one graph, ten times the cache of the device
SHAPES: dict[str, tuple[int, list[int], str]] = {  # of Qwen3-4B: columns, outputs of each weight, what comes next
    "gate, q, k, v": (2560, [512, 4096, 1024, 1024], "silu"),  # the gate's weight in fp32
    "o": (4096, [2560], "residual"),
    "gate_proj, up_proj": (2560, [9728, 9728], "multiply"),
    "down_proj": (9728, [2560], "residual"),
    "lm_head": (2560, [151_936], ""),
}
TILES = [
    fused.Tile(16, 512, 2, 4),
    fused.Tile(32, 128, 2, 4),
    fused.Tile(32, 256, 2, 3),
    fused.Tile(32, 256, 2, 4),
    fused.Tile(32, 256, 2, 5),
    fused.Tile(64, 128, 4, 3),
]


def measure(name: str, rows: int, rate: float, tiles: list) -> list[Measurement]:
    columns, sizes, after = SHAPES[name]
    options: dict[str, Any] = dict(device="cuda", dtype=torch.bfloat16)
    x = torch.randn(rows, columns, **options)
    nexts: dict[str, dict[str, Any]] = {
        "silu": dict(silu=(0,)),
        "residual": dict(residual=torch.randn(rows, sizes[0], **options)),
        "multiply": dict(multiply=True),
        "": {},
    }
    following = nexts[after]

    def random_weights() -> list[torch.Tensor]:
        made = [torch.randn(n, columns, **options) * columns**-0.5 for n in sizes]
        if "gate," in name:
            made[0] = made[0].float()
        return made

    first = random_weights()
    each = sum(weight.nbytes for weight in first)
    layers = [first, *(random_weights() for _ in range(max(1, LEAST_BYTES // each)))]
    biases = [None] * len(sizes)
    limit = each / rate / 1e3  # us

    def times(form: Any) -> tuple[float, float]:
        return replayed_us([partial(form, x, weights, biases, **following) for weights in layers])

    doubled: Any = {
        key: each[:, -64:].double() if isinstance(each, torch.Tensor) else each for key, each in following.items()
    }
    exact = naive.small_batch_linear(x.double(), [weight[-64:].double() for weight in first], biases, **doubled)[-1]
    found = []
    for contender, form in (("ours", fused.small_batch_linear), ("F.linear", naive.small_batch_linear)):
        last = form(x, first, biases, **following)[-1][:, -64:].double()
        error = ((last - exact).abs().max() / exact.std()).item()
        value, spread = times(form)
        found.append(Measurement(f"{name} rows={rows}", contender, value, "us", spread, limit, error=error))
    for tile in tiles:
        if "gate," in name and tile.warps != fused.WIDE.warps:
            continue
        with patch.object(fused, "tile_for", return_value=tile):
            value, spread = times(fused.small_batch_linear)
        found.append(
            Measurement(f"{name} rows={rows}", f"ours, {' '.join(map(str, tile))}", value, "us", spread, limit)
        )
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=[4])
    parser.add_argument("--sweep", action="store_true", help="tiles as well: outputs, columns, warps, stages")
    options = parser.parse_args()
    rate = bandwidth_gbs()
    found: list[Measurement] = []
    for rows in options.rows:
        total = dict.fromkeys(("ours", "F.linear"), 0.0)
        for name in SHAPES:
            measured = measure(name, rows, rate, TILES if options.sweep else [])
            for each in measured[:2]:
                total[each.contender] += each.value * (1 if name == "lm_head" else 36) / 1e3
            found += measured
        case = f"36 layers and lm_head, rows={rows}"
        found += [Measurement(case, contender, value, "ms") for contender, value in total.items()]
    report("small_batch_linear" + ("_sweep" if options.sweep else ""), found)


if __name__ == "__main__":
    main()
