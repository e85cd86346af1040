"""The next token of every row, each by its own settings, all rows at once on the device."""

import random
from dataclasses import dataclass, field

import torch

LEAST_TEMPERATURE = 1e-20  # in fp32 logits differ by more, so that below it only the likeliest is ever drawn


@dataclass(frozen=True)
class Sampling:
    """The sampling that a request asks for. A temperature of 0 takes the likeliest token."""

    max_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    seed: int = 0
    stop: tuple[str, ...] = field(default=())


class Sampler:
    """One chat's settings and random numbers of its own, so that a seed gives the same text in any company."""

    def __init__(self, sampling: Sampling):
        self.is_greedy = sampling.temperature == 0
        self.temperature = max(float(sampling.temperature), LEAST_TEMPERATURE)
        self.top_p = float(sampling.top_p)
        self._random = random.Random(sampling.seed)

    def number(self) -> float:
        """The next random number, from 0 to below 1, such that its product with any sum is below the sum."""
        return self._random.getrandbits(52) / 2**52


def next_tokens(logits: torch.Tensor, samplers: dict[int, Sampler]) -> dict[int, int | None]:
    """The next token of each row that has a sampler, None where the model gave NaN; one wait for the device.

    Args:
        logits: [rows, V] fp32.
    """
    most, tokens = logits.max(-1)
    for is_cut in (False, True):
        drawn = [row for row, one in samplers.items() if not one.is_greedy and (one.top_p < 1) == is_cut]
        if drawn:
            rows = torch.tensor(drawn, device=logits.device)
            chosen = [samplers[row] for row in drawn]
            settings = torch.tensor(
                [[one.temperature, one.top_p, one.number()] for one in chosen], dtype=torch.float64
            ).to(logits.device, non_blocking=True)
            scores = (logits[rows] - most[rows, None]) / settings[:, :1].float()
            tokens[rows] = draw(scores, settings[:, 2:], settings[:, 1:2] if is_cut else None)
    found = tokens.where(most.isfinite(), -1).tolist()
    return {row: found[row] if found[row] >= 0 else None for row in samplers}


def draw(scores: torch.Tensor, numbers: torch.Tensor, top_p: torch.Tensor | None) -> torch.Tensor:
    """Tokens [R] drawn from softmax(scores), by the random number at which the summed probabilities pass it.

    Args:
        scores: [R, V] fp32, the largest of each row 0.
        numbers: [R, 1] fp64, from 0 to below 1.
        top_p: [R, 1] fp64; only the likeliest tokens are drawn that together have so much, at least one. None: all.
    """
    share = scores.softmax(-1)
    order = None
    if top_p is not None:
        share, order = share.sort(dim=-1, descending=True, stable=True)
        before = share.double().cumsum(-1) - share
        share = share.masked_fill((before >= top_p) & (before > 0), 0)
    sums = share.double().cumsum(-1)
    place = torch.searchsorted(sums, numbers * sums[:, -1:], right=True)
    return (place if order is None else order.gather(-1, place))[:, 0]
