"""Time and memory of the distillation loss with its gradient, at the size of a Qwen3-4B head.

    python recipes/bench/distill_loss.py            # a minute on one H100
    python recipes/bench/distill_loss.py --sweep    # block sizes, warps, rows between the passes, chunk sizes

The rival makes whole logits, fp32 softmax and losses in torch and lets autograd find the gradient. The limit is that
of the three products with the head at the measured rate of matrix products.
"""

import argparse
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F

from retention_gates.kernels.distill_loss import distill_loss, fused, logits, naive
from retention_gates.recipes.bench.harness import Measurement, matrix_tflops, peak_mib, report, time_ms

BENCH = "distill_loss"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--positions", type=int, default=16_384)
    parser.add_argument("--vocabulary", type=int, default=151_936)
    parser.add_argument("--hidden-size", type=int, default=2_560)
    parser.add_argument("--chunk-sizes", type=int, nargs="*", default=[1024, 1280, 1408, 1536, 1664, 2048, 4096])
    parser.add_argument("--sweep", action="store_true", help="time kernel settings and chunk sizes instead")
    options = parser.parse_args()
    if options.sweep:
        sweep(options)
    else:
        compare(options)


def make_inputs(positions: int, vocabulary: int, hidden_size: int) -> tuple[torch.Tensor, ...]:
    """student, teacher, weight, targets: logits of a spread of about 3, the student's a little off the teacher's."""
    torch.manual_seed(0)
    teacher = torch.randn(positions, hidden_size, device="cuda", dtype=torch.bfloat16)
    student = (teacher + 0.1 * torch.randn_like(teacher)).requires_grad_()
    weight = torch.randn(vocabulary, hidden_size, device="cuda", dtype=torch.bfloat16) * (3 / hidden_size**0.5)
    return student, teacher, weight, torch.randint(vocabulary, (positions,), device="cuda")


def whole_logits(
    student: torch.Tensor, teacher: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor
) -> torch.Tensor:
    """The rival: forward KL plus cross entropy from fp32 logits of all positions."""
    with torch.no_grad():
        teacher_log = F.linear(teacher, weight).to(torch.promote_types(weight.dtype, torch.float32)).log_softmax(-1)
    student_log = F.linear(student, weight).to(teacher_log.dtype).log_softmax(-1)
    divergence = F.kl_div(student_log, teacher_log, log_target=True, reduction="batchmean")
    return divergence + F.nll_loss(student_log, targets)


def with_gradient(
    form: Callable[..., Any], student: torch.Tensor, *arguments: Any, **options: Any
) -> Callable[[], torch.Tensor]:
    """One call of `form` and its backward pass, to be timed."""

    def step() -> torch.Tensor:
        loss = form(student, *arguments, **options)
        return torch.autograd.grad(loss if isinstance(loss, torch.Tensor) else loss.total, student)[0]

    return step


def gradient_error(vocabulary: int, hidden_size: int, positions: int = 192) -> tuple[float, float]:
    """Relative errors of our gradient and of whole logits' in bf16 against fp64, by the largest entry."""
    student, teacher, weight, targets = make_inputs(positions, vocabulary, hidden_size)
    double = student.detach().double().requires_grad_()
    exact = with_gradient(whole_logits, double, teacher.double(), weight.double(), targets)()
    # a chunk that is no divisor, so that the last one is short
    ours = with_gradient(distill_loss, student, teacher, weight, targets, chunk_size=128)()
    torchs = with_gradient(whole_logits, student, teacher, weight, targets)()
    largest = exact.abs().max()
    return ((ours - exact).abs().max() / largest).item(), ((torchs - exact).abs().max() / largest).item()


def compare(options: argparse.Namespace) -> None:
    positions, vocabulary, hidden_size = options.positions, options.vocabulary, options.hidden_size
    case = f"T={positions} V={vocabulary} C={hidden_size} bf16 fwd+bwd"
    error, torch_error = gradient_error(vocabulary, hidden_size)
    if not error <= 2 * torch_error:
        raise SystemExit(f"wrong gradient: error {error:.2e}, whole logits in bf16 {torch_error:.2e}")
    inputs = make_inputs(positions, vocabulary, hidden_size)
    limit = 3 * 2 * positions * vocabulary * hidden_size / matrix_tflops() / 1e9  # ms

    rows = []

    def measure(contender: str, step: Callable[[], Any], error: float | None = None, repeats: int = 10) -> None:
        peak = peak_mib(step)
        milliseconds, spread = time_ms(step, warmup=1, repeats=repeats)
        rows.append(Measurement(case, contender, milliseconds, "ms", spread, limit, peak, error))

    measure("ours", with_gradient(distill_loss, *inputs), error)
    measure("ours, chunks of 1024", with_gradient(distill_loss, *inputs, chunk_size=1024))
    measure("products alone, same chunks", lambda: products(inputs))
    measure("plain torch, chunks of 1024", with_gradient(naive.distill_loss, *inputs, chunk_size=1024), repeats=3)
    try:
        measure("whole logits in torch", with_gradient(whole_logits, *inputs), torch_error, repeats=3)
    except torch.cuda.OutOfMemoryError:
        print(f"whole logits in torch: does not fit into {torch.cuda.mem_get_info()[1] / 2**30:.0f} GiB")
    report(BENCH, rows)


def products(inputs: tuple[torch.Tensor, ...], chunk_size: int = 1536) -> None:
    """Computes the rest of the loss, without the passes over the logits."""
    student, teacher, weight, _ = inputs
    hidden = student.detach()
    first, second = (weight.new_empty(chunk_size, len(weight)) for _ in range(2))
    gradient = torch.empty_like(hidden)
    for rows in torch.arange(len(hidden)).split(chunk_size):
        chunk, n = slice(int(rows[0]), int(rows[-1]) + 1), len(rows)
        torch.mm(hidden[chunk], weight.t(), out=first[:n])
        torch.mm(teacher[chunk], weight.t(), out=second[:n])
        torch.mm(first[:n], weight, out=gradient[chunk])


def sweep(options: argparse.Namespace) -> None:
    """First the passes over one chunk alone, then with the best setting the whole loss over chunk sizes."""
    positions, vocabulary, hidden_size = options.positions, options.vocabulary, options.hidden_size
    inputs = make_inputs(positions, vocabulary, hidden_size)
    rows, best = [], None
    for block, warps in ((2048, 4), (2048, 8), (4096, 4), (4096, 8), (4096, 16), (8192, 16), (8192, 32)):
        logits.BLOCK, logits.WARPS = block, warps
        step = passes(inputs, 1536)
        milliseconds, spread = time_ms(step, warmup=2, repeats=7)
        contender = f"{block} words, {warps} warps"
        rows.append(Measurement(f"passes over 1536 rows, V={vocabulary}", contender, milliseconds, "ms", spread))
        if best is None or milliseconds < best[0]:
            best = milliseconds, block, warps
    assert best is not None
    _, logits.BLOCK, logits.WARPS = best
    for chunk_size in options.chunk_sizes:
        step = with_gradient(distill_loss, *inputs, chunk_size=chunk_size)
        peak = peak_mib(step)
        milliseconds, spread = time_ms(step, warmup=1, repeats=5)
        rows.append(Measurement("whole loss", f"chunks of {chunk_size}", milliseconds, "ms", spread, peak_mib=peak))
        milliseconds, spread = time_ms(partial(products, inputs, chunk_size), warmup=1, repeats=3)
        rows.append(Measurement("products alone", f"chunks of {chunk_size}", milliseconds, "ms", spread))
    report(f"{BENCH}_sweep", rows)
    print(f"best setting of the passes: {best[1]} words, {best[2]} warps")


def passes(inputs: tuple[torch.Tensor, ...], rows: int) -> Callable[[], Any]:
    """The passes over the logits of `rows` positions, as the loss makes them, without the products."""
    student, teacher, weight, targets = (tensor.detach() for tensor in inputs)
    block = logits.block_of([weight])
    splits = -(-len(weight) // block)
    parts = torch.empty(rows, fused.PARTS.value, splits, device="cuda")
    factor = torch.ones(rows, device="cuda")
    shard = logits.ShardLogits(
        weight,
        None,
        0,
        slice(0, splits),
        parts,
        [targets[:rows], factor, factor],
        rows,
        block=block,
        logit_scale=1.0,
        softcap=None,
        has_teacher=True,
        has_kl=True,
    )
    shard.multiply(student[:rows], teacher[:rows])
    shard.statistics_then_gradient(0, rows)
    # as a graph: beside the products Python has time enough to launch, here it would be what is timed
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        shard.statistics_then_gradient(0, rows)
    return graph.replay


if __name__ == "__main__":
    main()
