"""Time of gate_evict for one token of one layer: batch 4, 8 heads of 128 numbers in bf16, by default.

    python recipes/bench/gate_evict.py

Layers with states of their own are captured in one CUDA graph, and the time is a replay's divided by their number. The
rival is the same in plain torch, called as eager code and captured too. All have to keep the same entries, else the
script fails. The limit is the state's traffic at the measured bandwidth; what a launch costs is far above it, and
"an empty kernel" is what a launch in the graph costs at least.
"""

import argparse
from collections.abc import Callable, Iterator
from functools import partial
from itertools import accumulate, pairwise
from typing import Any

import torch
import triton

from retention_gates.kernels.gate_evict import GateOutput, SlotState, fused, naive
from retention_gates.recipes.bench.harness import Measurement, bandwidth_gbs, replayed_us, report, time_ms

Form = Callable[..., None]
LAYERS = 36
STEP = 32_768


@triton.jit
def nothing() -> None:
    pass


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, nargs="+", default=[4])
    parser.add_argument("--heads", type=int, default=8)
    parser.add_argument("--memory-size", type=int, nargs="+", default=[1024, 4096])
    parser.add_argument("--head-dim", type=int, default=128)
    parser.add_argument("--gate-width", type=int, default=512)
    parser.add_argument("--sweep", action="store_true", help="warps and rounds as well")
    options = parser.parse_args()
    bandwidth = bandwidth_gbs()
    for batch in options.batch:
        for memory_size in options.memory_size:
            for measured in cases(batch, options.heads, memory_size, options.head_dim, options.gate_width, bandwidth):
                report("gate_evict", [measured])
            if options.sweep:
                report("gate_evict", sweep(batch, options.heads, memory_size, options.head_dim))
    value, spread = replayed_us([lambda: nothing[32, 1](num_warps=4)] * LAYERS)
    report("gate_evict", [Measurement("a launch in a graph", "an empty kernel", value, "us", spread)])


def cases(batch: int, heads: int, size: int, dim: int, width: int, bandwidth: float) -> Iterator[Measurement]:
    for kind, sizes in (("uniform", [size] * heads), ("ragged", ragged(size, heads))):
        case = f"B={batch} H={heads} D={dim} M={size} bf16 {kind}"
        offsets = tuple(accumulate((entries + 1 for entries in sizes), initial=0))
        states = [full_state(batch, offsets, dim) for _ in range(LAYERS)]
        token = [torch.randn(batch, heads, 1, dim, device="cuda", dtype=torch.bfloat16) for _ in range(2)]
        score = -torch.rand(batch, heads, device="cuda")
        gate = GateOutput(
            torch.randn(batch, width, device="cuda"),
            torch.randn(heads, width, device="cuda") * 0.02,
            torch.full((heads,), 8.0, device="cuda"),
        )
        check(states[0], token, score, offsets)
        limit = batch * offsets[-1] * (8 + 4 + 1) / bandwidth / 1e3  # us
        rule: dict[str, Any] = dict(linear_in_age=True, protected=torch.tensor([[0, 4]], device="cuda"))
        finished = dict(gate_hidden=gate.hidden, gate_weight=gate.weight, gate_bias=gate.bias)

        contenders: dict[str, tuple[Form, torch.Tensor | None, dict[str, Any]]] = {
            "ours": (fused.gate_evict, score, rule),
            "ours, with the gate's last layer": (fused.gate_evict, None, rule | finished),
            "plain torch, captured": (naive.gate_evict, score, rule),
        }
        for contender, (form, given, options) in contenders.items():
            value, spread = replayed_us([partial(form, state, *token, given, offsets, **options) for state in states])
            yield Measurement(case, contender, value, "us", spread, limit)
        if kind == "uniform":
            plain: Form = naive.gate_evict
            milliseconds, spread = time_ms(partial(plain, states[0], *token, score, offsets, **rule))
            value, spread = milliseconds * 1e3, spread * 1e3
            yield Measurement(case, "plain torch, launches queued", value, "us", spread, limit)


def sweep(batch: int, heads: int, size: int, dim: int) -> list[Measurement]:
    measured, chosen = [], (fused.SLOTS_PER_WARP, fused.MOST_WARPS, fused.ROUNDS)
    token = [torch.randn(batch, heads, 1, dim, device="cuda", dtype=torch.bfloat16) for _ in range(2)]
    score = -torch.rand(batch, heads, device="cuda")
    uniform, unequal = [size] * heads, ragged(size, heads)
    shapes = [("uniform", uniform, warps, 32) for warps in (4, 8, 16, 32)]
    shapes += [("ragged", unequal, warps, rounds) for warps, rounds in ((8, 16), (16, 8), (16, 16), (32, 8))]
    for kind, sizes, warps, rounds in shapes:
        offsets = tuple(accumulate((entries + 1 for entries in sizes), initial=0))
        states = [full_state(batch, offsets, dim) for _ in range(LAYERS)]
        fused.SLOTS_PER_WARP, fused.MOST_WARPS, fused.ROUNDS = 1, warps, tuple(range(1, rounds + 1))
        form: Form = fused.gate_evict
        value, spread = replayed_us([partial(form, s, *token, score, offsets, linear_in_age=True) for s in states])
        contender = f"ours, {warps} warps, {rounds} rounds"
        measured.append(
            Measurement(f"B={batch} H={heads} D={dim} M={size} bf16 {kind}", contender, value, "us", spread)
        )
    fused.SLOTS_PER_WARP, fused.MOST_WARPS, fused.ROUNDS = chosen
    return measured


def ragged(size: int, heads: int) -> list[int]:
    """Budgets from about a tenth of the mean to three times it, with the same sum."""
    weights = torch.logspace(-1, 0.5, heads, dtype=torch.float64)
    sizes = (weights / weights.sum() * size * heads).floor().long()
    sizes[-1] += size * heads - int(sizes.sum())
    return sizes.tolist()


def full_state(batch: int, offsets: tuple[int, ...], dim: int) -> SlotState:
    """A layer in the midst of decoding: every head is full and its last slot is pending."""
    shape = (batch, offsets[-1])
    positions = torch.empty(shape, dtype=torch.int64, device="cuda")
    for start, stop in pairwise(offsets):
        for row in range(batch):
            positions[row, start:stop] = torch.randperm(STEP, device="cuda")[: stop - start]
    pending = torch.zeros(shape, dtype=torch.bool, device="cuda")
    pending[:, [stop - 1 for stop in offsets[1:]]] = True
    entries = [torch.zeros(*shape, dim, dtype=torch.bfloat16, device="cuda") for _ in range(2)]
    score = -torch.rand(shape, device="cuda") * 1e-2
    counters = [torch.zeros(batch, dtype=torch.int64, device="cuda"), torch.tensor(STEP, device="cuda")]
    return SlotState(entries[0], entries[1], score, positions, pending, counters[0], counters[1])


def check(state: SlotState, token: list[torch.Tensor], score: torch.Tensor, offsets: tuple[int, ...]) -> None:
    states = [SlotState(*(tensor.clone() for tensor in state)) for _ in range(2)]
    for _ in range(20):
        forms: tuple[Form, Form] = naive.gate_evict, fused.gate_evict
        for form, own in zip(forms, states, strict=True):
            form(own, *token, score, offsets, linear_in_age=True)
    for name, expected, got in zip(
        ("positions", "pending", "seen"), *(own[3:5] + own[6:] for own in states), strict=True
    ):
        if not torch.equal(expected, got):
            raise SystemExit(f"{name} differ from plain torch's")


if __name__ == "__main__":
    main()
