"""The model with room for a fixed number of chats: one cache, a row for each."""

from collections.abc import Sequence
from contextlib import ExitStack

import torch
from torch import nn

from retention_gates.gates.adapter.families import text_config
from retention_gates.gates.adapter.model import find_gated_model
from retention_gates.gates.adapter.placement import check_room
from retention_gates.gates.attention.cache_layer import EvictingLayer
from retention_gates.gates.cache.bounded_cache import BoundedCache
from retention_gates.gates.cache.checks import row_bytes
from retention_gates.gates.decode.step import DecodeStep

STEPS_TO_CAPTURE = 4  # after which a step that can be captured is


class ChatRows:
    """Reads prompts one by one in a cache of their own, and decodes all rows together, one token each.

    A step computes the first rows, used or not, in one of a few counts, each of which is captured where a device can.
    All memory is allocated here; none is later.

    Args:
        model: with retention gates in every layer.
        rows: chats that can be decoded at a time.
        chunk_size: tokens of a prompt that are read at a time.
        counts: of rows that a step may have, the last being all; 1, 2, 4 and so on if not given. With one count, what
            a chat gets does not depend on how many others there are, down to the last bit.

    Raises:
        ValueError: for models with layers whose cache has no rows of fixed size.
    """

    def __init__(
        self,
        model: nn.Module,
        memory_size: int,
        *,
        rows: int,
        chunk_size: int,
        budgets: str | None = None,
        counts: Sequence[int] | None = None,
    ) -> None:
        self.model = model
        self.device = next(model.parameters()).device
        self.chunk_size = chunk_size
        self.context = _context(model)
        self.prompt = BoundedCache(model, memory_size, budgets=budgets)
        self._check_room(rows)
        self.cache = BoundedCache(model, memory_size, budgets=budgets)
        check_rows_come_and_go(model, self.cache)
        self.steps = 0  # since the last reset
        self.columns = 0  # that the rows count together
        self.counts = row_counts(rows) if counts is None else tuple(counts)
        assert self.counts[-1] == rows
        self._open = ExitStack()
        self._cache_of: dict[int, BoundedCache] = {}
        self._decode: dict[int, DecodeStep] = {}
        for count in reversed(self.counts):
            self._open_step(count, memory_size, budgets)
        self.read([0], 0)
        self.bytes_per_row = self.prompt.memory_bytes()
        self.reset()

    def _open_step(self, count: int, memory_size: int, budgets: str | None) -> None:
        """Makes a step of the first rows, which lie in the memory of all, and lets it be captured."""
        cache = self.cache
        if count < self.counts[-1]:
            cache = BoundedCache(self.model, memory_size, budgets=budgets)
            for layer, whole in zip(cache.gated_layers, self.cache.gated_layers, strict=True):
                layer.share_rows(whole, count)
        assert cache.decode_step is not None
        base = find_gated_model(self.model).model
        self._cache_of[count] = cache
        self._decode[count] = self._open.enter_context(cache.decode_step.opened(base, cache))
        zeros = [0] * count
        for _ in range(STEPS_TO_CAPTURE):
            self.step(zeros, zeros)

    def _check_room(self, rows: int) -> None:
        base = find_gated_model(self.model).model
        row, logits = row_bytes(base, self.prompt.slots), 4 * text_config(base).vocab_size

        def bytes_of(chats: int) -> int:
            return (chats + 1) * row + chats * logits  # one more row reads prompts

        check_room("max_chats", rows, bytes_of, self.device, "for their rows and forecasts")

    @torch.inference_mode()
    def read(self, ids: list[int], start: int) -> torch.Tensor:
        """Logits [1, V] after the next chunk of the one prompt that is being read, whose first token is `start`."""
        if start == 0:
            self.prompt.reset()
        tokens = torch.tensor([ids], device=self.device)
        positions = torch.arange(start, start + len(ids), device=self.device)[None]
        output = self.model(input_ids=tokens, position_ids=positions, past_key_values=self.prompt, logits_to_keep=1)
        return output.logits[:, -1].float()

    @torch.inference_mode()
    def place(self, row: int) -> None:
        """Lets the prompt that was read go on in this row."""
        self._set_columns(self.cache)
        self.cache.copy_row(row, self.prompt)
        self.columns = self.cache.gated_layers[0].columns

    @torch.inference_mode()
    def move(self, row: int, to: int) -> None:
        """Lets what goes on in a row go on in another one."""
        self._set_columns(self.cache)
        self.cache.copy_row(to, self.cache, row)

    def count_for(self, rows: int) -> int:
        """The fewest rows that a step may have and that are at least so many."""
        return next(count for count in self.counts if count >= rows)

    @torch.inference_mode()
    def step(self, tokens: list[int], positions: list[int]) -> torch.Tensor:
        """Logits [rows, V] after one more token in each of the first rows, as many as are given: one of `counts`."""
        cache, decode = self._cache_of[len(tokens)], self._decode[len(tokens)]
        self._set_columns(cache)
        self.steps += 1
        both = torch.tensor([tokens, positions], device=self.device)[:, :, None]
        output = decode(input_ids=both[0], position_ids=both[1], logits_to_keep=1)
        self.columns += 1
        return output.logits[:, -1].float()

    def _set_columns(self, cache: BoundedCache) -> None:
        """Tells a cache what steps of the others, whose counter on the device it shares, have read."""
        for layer in cache.gated_layers:
            layer.columns = self.columns

    def close(self) -> None:
        """Lets go of the model's weights, which a captured step reads."""
        self._open.close()

    def memory_bytes(self) -> int:
        """Held by all rows and the prompt that is being read."""
        return self.cache.memory_bytes() + self.prompt.memory_bytes()

    def reset(self) -> None:
        """Forgets all rows and the prompt; after an error too, when the layers do not agree."""
        self.steps = self.columns = 0
        for cache in self._cache_of.values():
            cache.reset()
        self.prompt.reset()


def row_counts(rows: int) -> tuple[int, ...]:
    """1, 2, 4 and so on, and all rows."""
    return (*(2**power for power in range(rows.bit_length()) if 2**power < rows), rows)


def check_rows_come_and_go(model: nn.Module, cache: BoundedCache) -> None:
    """Raises ValueError if a row of this cache cannot join a batch that is under way."""
    others = sorted({type(layer).__name__ for layer in cache.layers if not isinstance(layer, EvictingLayer)})
    if others:
        raise ValueError(
            f"{type(find_gated_model(model).model).__name__} has layers without a gate (their caches: "
            f"{', '.join(others)}), and rows of those cannot join a batch that is under way: serve a model and an "
            "adapter with a gate in every layer."
        )
    reasons = {layer.why_rows_stay or layer.why_rows_keep_columns for layer in cache.gated_layers} - {None}
    if reasons:
        raise ValueError(
            f"budgets={cache.budgets_from!r} move between heads while text is read, which rows that come "
            f"and go cannot do ({reasons.pop()}): serve with uniform, calibrated or pyramid budgets."
        )


def _context(model: nn.Module) -> int:
    """Tokens that the model's positions allow for, prompt and answer together."""
    return getattr(text_config(find_gated_model(model).model), "max_position_embeddings", None) or 2**24
