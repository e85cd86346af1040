"""Time, memory and error of the retention sum, forward and backward, on one GPU.

    python -m retention_gates.recipes.bench.retention_sum              # the table: every form at every length
    python -m retention_gates.recipes.bench.retention_sum --accuracy   # errors over rates and lengths, for the README
    python -m retention_gates.recipes.bench.retention_sum --sweep      # one launch parameter after the other

288 rows are the heads of a 36-layer model with 8 KV heads. LINEAR_FROM in kernels/retention_sum/fused.py is the least
length of the first table at which the linear form is the faster one. The rival is what the equation says: the square
of ages, exponentiated, masked and summed in plain torch, as many rows at a time as fit.
"""

import argparse
from collections.abc import Callable, Iterator
from dataclasses import fields, replace
from functools import partial
from typing import NamedTuple

import torch

from retention_gates.kernels.retention_sum import fused
from retention_gates.kernels.retention_sum.nodes import Settings
from retention_gates.recipes.bench.harness import Measurement, bandwidth_gbs, peak_mib, report, time_ms

ROWS = 288
LENGTHS = (256, 512, 1024, 2048, 4096, 16_384, 32_768, 131_072)
LONGEST_EXACT = 32_768
LONGEST_SQUARE = 16_384
RATES = (0, 1e-9, 1e-7, 1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 0.1, 0.3, 0.5, 0.62, 1, 3, 10, 40)
TRIED = {
    "chunk": (32, 64),
    "chunks": (16, 32),
    "warps": (2, 4, 8),
    "project_chunks": (1, 4, 16),
    "project_warps": (1, 2, 4),
    "scan_chunks": (16, 32, 64),
    "scan_warps": (2, 4, 8),
    "exact_tokens": (128, 256, 512),
    "exact_warps": (2, 4, 8),
}
TRIED_NODES = ((8, 0.72), (8, 0.9), (16, 1.8), (16, 2.2))  # order, interval


class Errors(NamedTuple):
    forward: float  # greatest |error of S_t| / S_t
    backward: float  # greatest |error of d log_beta_i| / sum_t |dS_t| age decay, what the gradient is a signed sum of

    @property
    def worst(self) -> float:
        return max(self)


def gate_like(rows: int, tokens: int, device: str = "cuda") -> torch.Tensor:
    """log_beta [1, rows, T] with half-lives from 1 to 1e6 tokens, evenly in the logarithm; 4 protected tokens."""
    generator = torch.Generator(device).manual_seed(0)
    half_life = torch.exp(torch.rand(1, rows, tokens, generator=generator, device=device) * 13.8)
    log_beta = -0.6931 / half_life
    log_beta[..., :4] = 0
    return log_beta


def reference(log_beta: torch.Tensor, gradient: torch.Tensor, rows: int = 512) -> tuple[torch.Tensor, ...]:
    """S, its gradient, and the gradient for |gradient|, in fp64 [R, T], `rows` steps at a time."""
    log_beta, gradient = log_beta.double(), gradient.double()
    tokens = log_beta.shape[-1]
    position = torch.arange(tokens, device=log_beta.device, dtype=torch.float64)
    mass, result, scale = (torch.zeros_like(log_beta) for _ in range(3))
    for start in range(0, tokens, rows):
        stop = min(tokens, start + rows)
        for row in range(len(log_beta)):
            age = position[start:stop, None] - position[:stop]
            decay = torch.exp(age.clamp(min=0) * log_beta[row, :stop]).masked_fill_(age < 0, 0)
            mass[row, start:stop] = decay.sum(-1)
            decay *= age
            result[row, :stop] += gradient[row, start:stop] @ decay
            scale[row, :stop] += gradient[row, start:stop].abs() @ decay
    return mass, result, scale


class Expected(NamedTuple):
    """A gradient of S and, from `reference`, what it should give."""

    gradient: torch.Tensor
    mass: torch.Tensor
    result: torch.Tensor
    scale: torch.Tensor


def expect(log_beta: torch.Tensor, *, positive: bool = False) -> Expected:
    """Expected results for [1, R, T], given a normal gradient of S, or with `positive` its absolute value."""
    generator = torch.Generator(log_beta.device).manual_seed(1)
    gradient = torch.randn(log_beta.shape, generator=generator, device=log_beta.device)
    gradient = gradient.abs() if positive else gradient
    return Expected(gradient, *reference(log_beta[0], gradient[0]))


def errors(log_beta: torch.Tensor, expected: Expected, linear: bool, settings: Settings) -> Errors:
    """Errors of one form against fp64, over every step and token."""
    mass = fused.forward(log_beta, None, False, linear, settings)[0]
    ours = fused.backward(expected.gradient, log_beta, None, False, linear, settings)[0]
    forward = ((mass - expected.mass).abs() / expected.mass).max().item()
    # below 1e-20 a gradient is nothing, and its relative error says nothing
    backward = ((ours - expected.result).abs() / expected.scale.clamp(min=1e-20)).max().item()
    return Errors(forward, backward)


def both_passes(
    log_beta: torch.Tensor,
    linear: bool,
    settings: Settings,
    *,
    documents: torch.Tensor | None = None,
    over_heads: bool = False,
) -> Callable[[], object]:
    batch, _heads, tokens = log_beta.shape
    gradient = torch.randn((batch, tokens) if over_heads else log_beta.shape, device=log_beta.device)

    def run() -> None:
        fused.forward(log_beta, documents, over_heads, linear, settings)
        fused.backward(gradient, log_beta, documents, over_heads, linear, settings)

    return run


def rows_of_square(log_beta: torch.Tensor, start: int, stop: int) -> torch.Tensor:
    """S of the steps start to stop, every age computed, those below 0 masked."""
    position = torch.arange(log_beta.shape[-1], device=log_beta.device)
    age = position[start:stop, None] - position
    return torch.exp(age.clamp(min=0) * log_beta[:, :, None]).masked_fill(age < 0, 0).sum(-1)


def square(log_beta: torch.Tensor) -> Callable[[], object]:
    """The full square in plain torch, in as many pieces as make the largest tensor 1 GiB."""
    inputs = log_beta.clone().requires_grad_()
    gradient = torch.randn_like(log_beta)
    tokens = log_beta.shape[-1]
    rows = max(1, 2**28 // log_beta.numel())

    def run() -> None:
        for start in range(0, tokens, rows):
            stop = min(tokens, start + rows)
            mass = rows_of_square(inputs, start, stop)
            mass.backward(gradient[:, :, start:stop])  # frees the piece before the next
        inputs.grad = None

    return run


def measure(
    case: str, contender: str, run: Callable[[], object], limit: float, error: float | None = None
) -> Measurement:
    peak = peak_mib(run)  # also compiles
    value, spread = time_ms(run, warmup=0, repeats=1)
    if value < 500:
        value, spread = time_ms(run, warmup=1, repeats=20 if value < 50 else 5)
    return Measurement(case, contender, value, "ms", spread, limit, peak, error)


def table() -> Iterator[Measurement]:
    settings, bandwidth = fused.SETTINGS, bandwidth_gbs()
    for tokens in LENGTHS:
        log_beta = gate_like(ROWS, tokens)
        case = f"T={tokens} rows={ROWS} fp32 fwd+bwd"
        # forward reads log_beta and writes S, backward reads log_beta and dS and writes d log_beta
        limit = 5 * log_beta.numel() * 4 / bandwidth / 1e6
        few = log_beta[:, :: ROWS // 2 if tokens > LONGEST_EXACT else ROWS // 8].contiguous()
        expected = expect(few)
        for name, linear in (("exact", False), ("linear", True)):
            if linear or tokens <= LONGEST_EXACT:
                error = errors(few, expected, linear, settings).worst
                yield measure(case, f"ours, {name}", both_passes(log_beta, linear, settings), limit, error)
        if tokens <= LONGEST_SQUARE:
            yield measure(case, "full square, plain torch", square(log_beta), limit)
    log_beta = gate_like(ROWS, 16_384)
    limit = 5 * log_beta.numel() * 4 / bandwidth / 1e6
    documents = (torch.arange(16_384, device="cuda") // 2048)[None]
    run = both_passes(log_beta, True, settings, documents=documents)
    yield measure("T=16384 packed 2048 fwd+bwd", "ours, linear", run, limit)
    run = both_passes(log_beta, True, settings, over_heads=True)
    yield measure("T=16384 over 288 heads fwd+bwd", "ours, linear", run, limit * 3 / 5)


def accuracy(lengths: tuple[int, ...] = (1024, 16_384, 131_072), device: str = "cuda") -> None:
    """Prints the greatest error of rows of one rate each, and of a row of all rates mixed."""
    print(
        "| T | rate | exact forward | exact backward | linear forward | linear backward |\n|---|---|---|---|---|---|"
    )
    generator = torch.Generator().manual_seed(2)
    for tokens in lengths:
        mixed = torch.tensor(RATES)[torch.randint(len(RATES), (tokens,), generator=generator)]
        for name, rate in [*((f"{rate:g}", torch.full((tokens,), rate)) for rate in RATES), ("mixed", mixed)]:
            log_beta = -rate.float().to(device)[None, None]
            # errors of one sign add up with gradients of one sign only
            both = [expect(log_beta, positive=positive) for positive in (False, True)]
            cells = []
            for linear in (False, True):
                found = [errors(log_beta, expected, linear, fused.SETTINGS) for expected in both]
                cells += [f"{max(column):.1e}" for column in zip(*found, strict=True)]
            print(f"| {tokens} | {name} | {' | '.join(cells)} |", flush=True)


def sweep(tokens: int) -> None:
    """Prints time and error with each parameter changed alone."""
    log_beta = gate_like(ROWS, tokens)
    few = log_beta[:, :: ROWS // 4].contiguous()
    expected = expect(few)
    gradient = torch.randn_like(log_beta)
    tried = [(False, fused.SETTINGS), (True, fused.SETTINGS)]
    tried += [(True, replace(fused.SETTINGS, order=order, interval=width)) for order, width in TRIED_NODES]
    for name, values in TRIED.items():
        tried += [(not name.startswith("exact"), replace(fused.SETTINGS, **{name: value})) for value in values]
    print(f"{'form':8} {'forward':>8} {'backward':>8} ms {'fwd err':>8} {'bwd err':>8}  changed, T={tokens}")
    for linear, settings in dict.fromkeys(tried):
        options = (None, False, linear, settings)
        forward, _ = time_ms(partial(fused.forward, log_beta, *options))
        backward, _ = time_ms(partial(fused.backward, gradient, log_beta, *options))
        error = errors(few, expected, linear, settings)
        changed = [
            f"{field.name}={getattr(settings, field.name)}"
            for field in fields(settings)
            if getattr(settings, field.name) != getattr(fused.SETTINGS, field.name)
        ]
        form = "linear" if linear else "exact"
        print(
            f"{form:8} {forward:8.3f} {backward:8.3f}    {error.forward:8.1e} {error.backward:8.1e}  "
            f"{' '.join(changed) or 'nothing'}",
            flush=True,
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--accuracy", action="store_true", help="errors over rates and lengths instead of times")
    parser.add_argument("--sweep", action="store_true", help="times of other launch parameters")
    parser.add_argument("--tokens", type=int, default=16_384, help="the length that --sweep measures")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("this benchmark needs a CUDA device.")
    if options.accuracy:
        accuracy()
    elif options.sweep:
        sweep(options.tokens)
    else:
        report("retention_sum", list(table()))


if __name__ == "__main__":
    main()
