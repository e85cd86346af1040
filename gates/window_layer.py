"""The cache of a layer with sliding-window attention, in places that stay where they are."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from transformers.cache_utils import DynamicSlidingWindowLayer


class WindowLayer(DynamicSlidingWindowLayer):
    """What transformers keeps of such a layer, with the entry of column c in place c % window.

    State: keys [B, H, W, D]; values [B, H, W, Dv]; seen [], columns so far, which is cumulative_length on the device.
    While a step is recorded that reads no number of the host, `visible` says which places its one token sees.
    """

    keys: torch.Tensor
    values: torch.Tensor
    seen: torch.Tensor
    visible: torch.Tensor | None = None  # bool [B, W]

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        self.dtype, self.device = key_states.dtype, key_states.device
        self.batch_size = key_states.shape[0]
        with torch.inference_mode(False):  # a cache begun in inference mode can then be used outside of it too
            self.keys, self.values = (
                torch.zeros(*x.shape[:2], self.sliding_window, x.shape[3], dtype=x.dtype, device=x.device)
                for x in (key_states, value_states)
            )
            self.seen = torch.zeros((), dtype=torch.int64, device=self.device)
        self.is_initialized = True

    @torch.no_grad()
    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args, **kwargs
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        tokens = key_states.shape[2]
        if self.visible is not None:
            place = (self.seen % self.sliding_window)[None]
            self.keys.index_copy_(2, place, key_states)
            self.values.index_copy_(2, place, value_states)
            self.seen += 1
            return self.keys, self.values
        past = self._places(self.cumulative_length - self.sliding_window + 1, self.cumulative_length)
        full = (
            torch.cat([self.keys[:, :, past], key_states], dim=2),
            torch.cat([self.values[:, :, past], value_states], dim=2),
        )
        end = self.cumulative_length + tokens
        last = self._places(max(self.cumulative_length, end - self.sliding_window), end)
        self.keys[:, :, last] = key_states[:, :, -len(last) :]
        self.values[:, :, last] = value_states[:, :, -len(last) :]
        self.seen += tokens
        self.cumulative_length += tokens
        return full

    def _places(self, start: int, stop: int) -> torch.Tensor:
        """Where the columns start..stop-1 lie; there are none below 0."""
        return torch.arange(max(0, start), stop, device=self.device) % self.sliding_window

    def get_seq_length(self) -> Any:
        """Columns so far; for a recorded step on the device."""
        return self.cumulative_length if self.visible is None else self.seen.clone()

    def get_mask_sizes(self, query_length: int) -> tuple[int, Any]:
        """Entries to attend to and the column of the first; for a recorded step `visible`, from which its mask is."""
        if self.visible is None:
            return super().get_mask_sizes(query_length)
        return self.sliding_window, self.visible

    def reset(self) -> None:
        self.cumulative_length = 0
        if self.is_initialized:
            self.seen.zero_()

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        if self.is_initialized:
            for state in (self.keys, self.values):
                state.copy_(state.index_select(0, beam_idx.to(self.device)))

    def crop(self, tokens_to_remove: int) -> None:
        if tokens_to_remove != 0:
            raise ValueError(f"crop({tokens_to_remove}): what a window held before is overwritten.")


class Windows:
    """All window layers of a cache while one token at a time is recorded; they have one window."""

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
        """The same for another turn, in the tensor that a recording reads."""
        self.visible.copy_(Windows(self.layers, mask).visible)

    @contextmanager
    def one_token(self) -> Iterator[None]:
        """Inside of it one token enters, and sees what is in the window."""
        self.visible.index_fill_(1, (self.layers[0].seen % self.window)[None], True)
        for layer in self.layers:
            layer.visible = self.visible
        try:
            yield
        finally:
            for layer in self.layers:
                layer.visible = None
        self.count()

    def count(self) -> None:
        """A token on the host; the recorded step counts on the device."""
        for layer in self.layers:
            layer.cumulative_length += 1
