"""Fading of keys in the attention that gates are trained with."""

from dataclasses import dataclass

import torch


@dataclass
class Fading:
    """Settings that the layers of a model share while it trains; see `RetentionTrainingArguments` for why.

    Attributes:
        gaussian: whether a key loses the square of age * log_beta of its logit, instead of age * log_beta.
        stretch: [B], by how much longer the row's tokens are seen than their gates say, as with more memory.
            None: not at all.
    """

    gaussian: bool = False
    stretch: torch.Tensor | None = None

    def of(self, log_beta: torch.Tensor) -> torch.Tensor:
        """log_beta [B, H, T] as attention has to take it."""
        return log_beta if self.stretch is None else log_beta / self.stretch[:, None, None]
