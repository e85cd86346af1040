"""The next token of every row, each by its own settings."""

from dataclasses import dataclass, field

import torch
from transformers import LogitsProcessorList, TemperatureLogitsWarper, TopPLogitsWarper


@dataclass(frozen=True)
class Sampling:
    """What a request asks for. A temperature of 0 takes the likeliest token."""

    max_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    seed: int = 0
    stop: tuple[str, ...] = field(default=())


class Sampler:
    """Draws one chat's tokens, from random numbers of its own, so that a seed gives the same text in any company."""

    def __init__(self, sampling: Sampling, device: torch.device):
        self.is_greedy = sampling.temperature == 0
        if self.is_greedy:
            return
        self.processors = LogitsProcessorList()
        if sampling.temperature != 1:
            self.processors.append(TemperatureLogitsWarper(float(sampling.temperature)))
        if sampling.top_p < 1:
            self.processors.append(TopPLogitsWarper(float(sampling.top_p)))
        self.generator = torch.Generator(device).manual_seed(sampling.seed)

    def draw(self, logits: torch.Tensor) -> torch.Tensor:
        """One token, [1], of logits [1, V]; never waits for the device."""
        no_history = torch.LongTensor(1, 0).to(logits.device)
        scores: torch.Tensor = self.processors(no_history, logits)  # type: ignore[arg-type]
        # the largest of p / noise is distributed as a draw from p; torch.multinomial would wait, to check p
        noise = torch.empty_like(scores).exponential_(generator=self.generator)
        return (scores.softmax(-1) / noise).argmax(-1)


def next_tokens(logits: torch.Tensor, samplers: dict[int, Sampler]) -> dict[int, int | None]:
    """The next token of each row that has a sampler, None where the model gave NaN; one wait for the device.

    Args:
        logits: [rows, V] fp32.
    """
    tokens = logits.argmax(-1)
    for row, sampler in samplers.items():
        if not sampler.is_greedy:
            tokens[row : row + 1] = sampler.draw(logits[row : row + 1])
    chosen = tokens.where(~logits.isnan().any(-1), -1).tolist()
    return {row: chosen[row] if chosen[row] >= 0 else None for row in samplers}
