"""How far back a token is seen where attention evicts while it trains."""

import math
from collections.abc import Sequence

import torch


class Horizon:
    """The decay, -log retention, beyond which tokens are not seen: such that all heads hold memory_size in the mean.

    One number for each memory size, which follows what is held. Everything stays on the device, at fixed addresses.
    """

    RATE = 0.5  # of the correction by which a step's count is off, in logs

    def __init__(self, memory_sizes: Sequence[int], device: torch.device):
        self.sizes = torch.tensor([math.log(size) for size in memory_sizes], device=device)
        self.logs = torch.zeros_like(self.sizes)
        self.chosen = torch.zeros_like(self.sizes)  # 1 at the size of this step

    def choose(self, step: int) -> None:
        self.chosen.zero_()
        self.chosen[step % len(self.chosen)] = 1.0

    @property
    def value(self) -> torch.Tensor:
        return (self.logs * self.chosen).sum().exp()

    @torch.no_grad()
    def follow(self, held: Sequence[torch.Tensor]) -> None:
        """Args: held: mean entries per KV head of each layer."""
        off = self.sizes - torch.stack(list(held)).mean().log()
        self.logs += self.RATE * self.chosen * off
