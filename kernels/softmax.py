"""The numbers that make attention weights of logits."""

from typing import NamedTuple

import torch


class Softmax(NamedTuple):
    """Weights are softmax(logits), logits = cap(q k * scale), with one more logit per head where there are sinks."""

    scale: float  # what q k is multiplied with
    softcap: float | None = None  # cap(x) = softcap * tanh(x / softcap); None: cap(x) = x
    sinks: torch.Tensor | None = None  # [HQ], an extra logit per query head, in the denominator only

    @property
    def is_plain(self) -> bool:
        """Whether there is neither a cap nor a sink, as torch's own attention functions have it."""
        return self.softcap is None and self.sinks is None

    def of_heads(self, query_heads: slice) -> "Softmax":
        """The same for some of the query heads."""
        return self if self.sinks is None else self._replace(sinks=self.sinks[query_heads])

    def check(self, query_heads: int) -> None:
        """Raises ValueError for a softcap or sinks that cannot be."""
        if self.softcap is not None and not self.softcap > 0:
            raise ValueError(f"softcap must be above 0, not {self.softcap}: pass None for no cap.")
        if self.sinks is not None and tuple(self.sinks.shape) != (query_heads,):
            raise ValueError(f"sinks must be [HQ] = [{query_heads}], not {list(self.sinks.shape)}.")
