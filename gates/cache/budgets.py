"""From a mean number of entries per KV head to a number for every layer and head."""

import math
from collections.abc import Iterator, Sequence
from fractions import Fraction

import torch

from retention_gates.gates.attention.documents import document_offsets
from retention_gates.kernels.retention_sum import retention_sum

BUDGETS = ("uniform", "calibrated", "pyramid", "adaptive", "global")
Budgets = list[list[int]]  # [gated layers][KV heads], in entries
STEEPNESS = 20  # beta in PyramidKV
LEAST_CALIBRATED = 12  # the floor under which calibrated budgets were measured, at a memory_size of 32 to 256


def uniform_budgets(layers: int, heads: int, memory_size: int) -> Budgets:
    """The same budget for every head."""
    return [[memory_size] * heads for _ in range(layers)]


def pyramid_budgets(layers: int, heads: int, memory_size: int, floor: int) -> Budgets:
    """The lower a layer the more, falling evenly, memory_size entries per head in the mean, exactly.

    The last layer gets a 20th of the mean, as far as the floor allows. The paper adds an observation window to every
    layer's budget; here all that a head holds counts.

    Source: "PyramidKV: Dynamic KV Cache Compression based on Pyramidal Information Funneling",
    https://arxiv.org/abs/2406.02069
    """
    last = 1 / STEEPNESS
    first = 2 - last
    steps = max(layers - 1, 1)
    shares = [[first - layer * (first - last) / steps] for layer in range(layers)]
    return [row * heads for row in calibrated_budgets(shares, memory_size, floor)]


def calibrated_budgets(shares: list[list[float]], memory_size: int, floor: int) -> Budgets:
    """Budgets in proportion to the shares, none below the floor, memory_size entries per head in the mean, exactly.

    Heads whose proportion is below the floor get the floor; the others share the rest in proportion, rounded by
    largest remainder (of equal ones the first layer and head).

    Args:
        shares: [layers][heads], >= 0, in any unit; all 0 means all equal.

    Raises:
        ValueError: for shares that are no finite numbers >= 0, and for a floor above memory_size.
    """
    flat = [share for row in shares for share in row]
    if not flat or not all(math.isfinite(share) and share >= 0 for share in flat):
        raise ValueError("budget shares must be finite numbers of at least 0: run retention-gates calibrate again.")
    if floor > memory_size:
        raise ValueError(
            f"memory_size={memory_size} is below the {floor} entries that every head must be able to hold: raise it, "
            "or protect and pin fewer tokens."
        )
    weights = [Fraction(share) for share in flat] if any(flat) else [Fraction(1)] * len(flat)  # sums come out exactly
    total = memory_size * len(flat)
    at_floor: set[int] = set()
    while True:
        rest = total - floor * len(at_floor)
        mass = sum(share for i, share in enumerate(weights) if i not in at_floor)
        exact = {i: rest * share / mass for i, share in enumerate(weights) if i not in at_floor}
        below = {i for i, entries in exact.items() if entries < floor}
        if not below:
            break
        at_floor |= below
    budgets = [floor] * len(flat)
    for i, entries in exact.items():
        budgets[i] = math.floor(entries)
    by_remainder = sorted(exact, key=lambda i: (budgets[i] - exact[i], i))
    for i in by_remainder[: total - sum(budgets)]:
        budgets[i] += 1
    assert sum(budgets) == total
    entries_of = iter(budgets)
    return [[next(entries_of) for _ in row] for row in shares]


def retained_masses(
    log_beta: Sequence[torch.Tensor], document_ids: torch.Tensor | None
) -> Iterator[tuple[list[int], torch.Tensor, torch.Tensor | None]]:
    """Retained mass of the layers of each device: their indices, the mass [B, L, H, T], and document_ids there.

    One sum over the heads of all layers costs hardly more than that of one layer: its kernels are small.

    Args:
        log_beta: fp32 [B, H, T] of each gated layer, 0 at protected tokens.
        document_ids: int64 [B, T], or None if every row is one document.
    """
    devices: dict[torch.device, list[int]] = {}
    for index, layer in enumerate(log_beta):
        devices.setdefault(layer.device, []).append(index)
    for device, layers in devices.items():
        documents = None if document_ids is None else document_ids.to(device)
        heads = torch.cat([log_beta[index] for index in layers], dim=1)  # [B, L * H, T]
        # without a kernel, memory stays that of one layer
        mass = retention_sum(heads, document_ids=documents, chunk_size=max(1, 256 // len(layers)))
        yield layers, mass.unflatten(1, (len(layers), -1)), documents


class RetainedMass:
    """The mean retained mass S_t of every gated layer and KV head, over any number of forward passes: budget shares.

    A head of mass 50 keeps, in the eyes of its gate, 50 tokens alive at a time. Steps near the start of a document are
    left out, because nothing has decayed there yet.

    Usage: `with record(model) as recording: model(rows)`, `mass.add(recording.log_beta, recording.document_ids)`.
    """

    def __init__(self, first_step: int = 512):
        self.first_step = first_step  # in tokens from the document's start
        self.totals: list[torch.Tensor] = []  # [H] each, fp64
        self.steps = 0

    @torch.no_grad()
    def add(self, log_beta: list[torch.Tensor], document_ids: torch.Tensor | None = None) -> None:
        """Adds one pass: log_beta of every gated layer [B, H, T], protected tokens at 0; document_ids [B, T]."""
        batch, _, tokens = log_beta[0].shape
        if document_ids is None:
            counts = (torch.arange(tokens, device=log_beta[0].device) >= self.first_step).expand(batch, -1)
        else:
            counts = (document_offsets(document_ids) >= self.first_step) & (document_ids >= 0)
        sums: dict[int, torch.Tensor] = {}
        for layers, mass, _ in retained_masses(log_beta, document_ids):
            where = counts[:, None, None].to(mass.device)
            sums |= zip(layers, (mass * where).double().sum((0, 3)).cpu(), strict=True)
        masses = [sums[layer] for layer in range(len(log_beta))]
        self.totals = [a + b for a, b in zip(self.totals, masses, strict=True)] if self.totals else masses
        self.steps += int(counts.sum())

    def shares(self) -> list[list[float]]:
        """Mean retained mass in tokens, [gated layers][KV heads].

        Raises:
            ValueError: if no step was late enough to count.
        """
        if self.steps == 0:
            raise ValueError(
                f"No document has more than {self.first_step} tokens: calibrate on longer ones, or from an earlier "
                "step."
            )
        return [(total / self.steps).tolist() for total in self.totals]
