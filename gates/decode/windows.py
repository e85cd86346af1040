"""The window layers of a cache while one token at a time is decoded."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch

from retention_gates.gates.adapter.modes import temporarily
from retention_gates.gates.cache.window_layer import WindowLayer


class Windows:
    """All window layers of a cache while one token at a time is captured; they have one window."""

    def __init__(self, layers: Sequence[WindowLayer], mask: torch.Tensor | None):
        """Starts where the layers stand.

        Args:
            mask: the padding mask [B, S] of all columns so far and the next, or None.
        """
        first = layers[0]
        self.layers, self.window = layers, first.sliding_window
        newest = first.cumulative_length - 1
        columns = newest - (newest - torch.arange(self.window, device=first.device)) % self.window
        visible = (columns >= 0).expand(first.batch_size, -1)
        if mask is not None:
            # columns that the mask does not have count as padding, as they do in transformers
            known = columns.clamp(0, mask.shape[1] - 1)
            visible = visible & mask.bool()[:, known] & (columns < mask.shape[1])
        self.visible = visible.clone()

    def restart(self, mask: torch.Tensor | None) -> None:
        """The same for another turn, in the tensor that a capture reads."""
        self.visible.copy_(Windows(self.layers, mask).visible)

    @contextmanager
    def one_token(self) -> Iterator[None]:
        """Inside of it one token enters, and sees what is in the window."""
        self.visible.index_fill_(1, (self.layers[0].seen % self.window)[None], True)
        with temporarily(self.layers, visible=self.visible):
            yield
        self.count()

    def count(self) -> None:
        """A token on the host; the captured step counts on the device."""
        for layer in self.layers:
            layer.cumulative_length += 1
