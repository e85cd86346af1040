"""Time to find every token's eviction: 30 layers x 3 heads x 16 rows of 2,048 tokens, an evaluation of SmolLM2-135M.

    python recipes/bench/eviction_times.py

Budgets are ragged, log-uniform from 32 to 512. "One call" takes all layers as heads of one call, "30 calls" go layer
by layer as a simulated cache does. The result has to equal plain torch's on the GPU and on the CPU, else the script
fails. The limit is the traffic, at the measured bandwidth; the chain of 2,048 steps is far above it.
"""

import argparse
import time
from collections.abc import Callable

import torch

from retention_gates.kernels.eviction_times import fused, naive
from retention_gates.recipes.bench.harness import Measurement, bandwidth_gbs, report, time_ms

Form = Callable[..., torch.Tensor]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=30)
    parser.add_argument("--heads", type=int, default=3)
    parser.add_argument("--rows", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=2048)
    options = parser.parse_args()
    layers, heads, rows, tokens = options.layers, options.heads, options.rows, options.tokens

    torch.manual_seed(0)
    half_life = torch.empty(rows, layers * heads, tokens, device="cuda").uniform_(1, 12).exp()  # in tokens
    score = -torch.log(torch.tensor(2.0, device="cuda")) / half_life  # log_beta
    budgets = (32 * 16 ** torch.rand(layers * heads, device="cuda")).round().long()
    budgets[0], budgets[-1] = 32, 512
    protected = (torch.arange(tokens, device="cuda") < 4).expand(rows, tokens)

    def one_call(form: Form, device: str) -> Callable[[], torch.Tensor]:
        arguments = score.to(device), budgets.to(device)
        flags = dict(protected=protected.to(device), linear_in_age=True, largest_budget=int(budgets.max()))
        return lambda: form(*arguments, **flags)

    def call_per_layer(form: Form) -> Callable[[], torch.Tensor]:
        parts = [
            (part.contiguous(), own, int(own.max()))
            for part, own in zip(score.split(heads, dim=1), budgets.split(heads), strict=True)
        ]
        return lambda: torch.cat(
            [
                form(part, own, linear_in_age=True, largest_budget=largest, protected=protected)
                for part, own, largest in parts
            ],
            dim=1,
        )

    ours = one_call(fused.eviction_times, "cuda")
    times = ours()
    if not torch.equal(call_per_layer(fused.eviction_times)(), times):
        raise SystemExit("layer by layer the fused kernel finds other times than in one call")

    case = f"{rows} x {layers * heads} heads, T={tokens}, 32-512"
    limit = score.numel() * (4 + 8) / bandwidth_gbs() / 1e6  # ms
    measured = []
    for contender, step in (("ours, one call", ours), (f"ours, {layers} calls", call_per_layer(fused.eviction_times))):
        milliseconds, spread = time_ms(step)
        measured.append(Measurement(case, contender, milliseconds, "ms", spread, limit))
    chosen = fused.ENTRIES_PER_WARP
    for fused.ENTRIES_PER_WARP in (128, 512, 1024):
        milliseconds, spread = time_ms(ours)
        contender = f"ours, {fused.ENTRIES_PER_WARP} slots a warp"
        measured.append(Measurement(case, contender, milliseconds, "ms", spread, limit))
    fused.ENTRIES_PER_WARP = chosen
    for device in ("cuda", "cpu"):
        # by the wall clock, once: it waits for the device at every block of steps
        step = one_call(naive.eviction_times, device)
        begin = time.perf_counter()
        expected = step().cuda()
        milliseconds = (time.perf_counter() - begin) * 1e3
        if not torch.equal(times, expected):
            raise SystemExit(f"{int((times != expected).sum())} times differ from plain torch's on {device}")
        measured.append(Measurement(case, f"plain torch on {device}, one call", milliseconds, "ms", limit=limit))
    report("eviction_times", measured)


if __name__ == "__main__":
    main()
