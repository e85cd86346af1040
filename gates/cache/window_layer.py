"""The cache of a layer with sliding-window attention, in places that stay where they are."""

from typing import Any

import torch
from transformers.cache_utils import DynamicSlidingWindowLayer


class WindowLayer(DynamicSlidingWindowLayer):
    """Keeps what transformers does of such a layer, with the entry of column c in place c % window.

    State: keys [B, H, W, D]; values [B, H, W, Dv]; seen [], columns so far, which is cumulative_length on the device.
    While a step is captured that reads no number of the host, `visible` marks the places that its one token sees.
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
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
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
        """Columns so far; for a captured step on the device."""
        return self.cumulative_length if self.visible is None else self.seen.clone()

    def get_mask_sizes(self, query_length: int) -> tuple[int, Any]:
        """Entries to attend to and the column of the first; for a captured step `visible`, from which its mask is."""
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
