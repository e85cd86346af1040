"""Answers to many prompts at once, each of them token for token what `generate` gives for its prompt alone.

Where the rows of a cache can be copied, an answer that ends makes place for the next prompt, which is read in a cache
of its own and then joins the batch: `BoundedCache.begin_at` and `copy_rows`. Other caches, as those of models with
sliding windows and the full cache, answer batches of prompts that are padded on the left.
"""

from collections import deque
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from functools import partial
from operator import mul
from typing import Any

import torch
from torch import nn
from transformers import DynamicCache
from transformers.cache_utils import Cache

from retention_gates.gates.adapter.families import text_config
from retention_gates.gates.adapter.generate_arguments import chunk_size, refuse_dropped_cache
from retention_gates.gates.adapter.model import find_gated_model
from retention_gates.gates.adapter.modes import evaluating
from retention_gates.gates.adapter.placement import check_room
from retention_gates.gates.attention.cache_argument import named_for
from retention_gates.gates.cache.bounded_cache import BoundedCache
from retention_gates.gates.cache.checks import row_bytes
from retention_gates.gates.policies.eviction_rule import MOST_TOKENS
from retention_gates.trainers.evaluation.answer_rows import AnswerRows, Job

Answers = Iterator[tuple[int, list[int]]]
READ_TOKENS = 16_384  # of prompts that are read together, to join a batch that writes
STEPS_BETWEEN_LOOKS = {"cpu": 1}  # by the type of device; others queue steps while they work, and a look waits
STEPS_BETWEEN_LOOKS_ELSEWHERE = 8
FREE_SHARE = 8  # prompts are read, or rows dropped, when one in so many has ended: few take as long as many


def answer_prompts(
    model: nn.Module,
    prompts: Sequence[Sequence[int]],
    *,
    cache_of: Callable[[], Cache] | None,
    batch_size: int,
    max_new_tokens: int | Sequence[int],
    eos: Collection[int] | None = None,
    temperature: float = 0.0,
    seed: int | Sequence[int] = 0,
    prefill_chunk_size: int | None = None,
) -> Answers:
    """Gives (index of the prompt, its answer's tokens) as the answers end, the token that ends one included.

    While the iterator is open, the model is in evaluation mode and, for the full cache, its gates are off.

    Args:
        model: with retention gates.
        prompts: token ids of each.
        cache_of: makes an empty cache, such as `lambda: BoundedCache(model, 64)`; None for the full cache of the base
            model, with the gates off.
        batch_size: answers that are written at a time.
        max_new_tokens: of every answer, or of each.
        eos: tokens that end an answer; None for those of the model's generation_config.
        temperature: 0 takes the likeliest token, whatever the generation_config asks for.
        seed: of all answers, which then draw different random numbers, or of each. A prompt's answer depends on its
            seed, not on what it shares a batch with.
        prefill_chunk_size: tokens of a prompt that are read at a time, as in `generate`.

    Raises:
        ValueError: for a prompt without tokens or that the model has no positions for, and numbers out of range.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size={batch_size} must be 1 or more.")
    if not 0 <= temperature < float("inf"):
        raise ValueError(f"temperature={temperature} must be 0, for the likeliest token, or above, and finite.")
    base = find_gated_model(model).model
    eos = ending_tokens(model) if eos is None else eos
    most = [max_new_tokens] * len(prompts) if isinstance(max_new_tokens, int) else list(max_new_tokens)
    seeds = [(seed, i) for i in range(len(prompts))] if isinstance(seed, int) else [(each,) for each in seed]
    given = zip(range(len(prompts)), prompts, most, seeds, strict=True)
    jobs = [Job(index, list(ids), new_tokens, each) for index, ids, new_tokens, each in given]
    for job in jobs:
        _check(job, base, is_full=cache_of is None)
    writer = _Writer(model, cache_of, batch_size, eos, temperature, prefill_chunk_size)
    return writer.answers(jobs)


def ending_tokens(model: nn.Module) -> list[int]:
    """Tokens that end an answer, by the model's generation_config."""
    config: Any = find_gated_model(model).model.generation_config
    tokens = config.eos_token_id if isinstance(config.eos_token_id, list) else [config.eos_token_id]
    return [token for token in tokens if token is not None]


def _check(job: Job, base: nn.Module, *, is_full: bool) -> None:
    if not job.ids:
        raise ValueError(f"Prompt {job.index} has no tokens.")
    if job.most < 1:
        raise ValueError(f"max_new_tokens={job.most} must be 1 or more.")
    if min(job.seed) < 0:
        raise ValueError(f"seed={min(job.seed)} must be 0 or more.")
    wanted, there = len(job.ids) + job.most, getattr(text_config(base), "max_position_embeddings", None)
    if there is not None and wanted > there:
        raise ValueError(
            f"Prompt {job.index} has {len(job.ids)} tokens, and its answer may have {job.most}, but the model has "
            f"{there} positions: shorten the prompt or max_new_tokens, or take a model with a longer context."
        )
    if not is_full:
        refuse_dropped_cache(text_config(base), wanted)


class _Writer:
    """Writes the answers to some prompts with caches of one kind."""

    def __init__(
        self,
        model: Any,
        cache_of: Callable[[], Cache] | None,
        batch_size: int,
        eos: Collection[int],
        temperature: float,
        prefill_chunk_size: int | None,
    ):
        self.model, self.base = model, find_gated_model(model).model
        self.device: torch.device = next(self.base.parameters()).device
        self.is_full = cache_of is None
        self.cache_of = cache_of or (lambda: DynamicCache(config=text_config(self.base)))
        self.batch_size, self.eos, self.temperature = batch_size, eos, temperature
        self.prefill_chunk_size = prefill_chunk_size
        self.between_looks = STEPS_BETWEEN_LOOKS.get(self.device.type, STEPS_BETWEEN_LOOKS_ELSEWHERE)

    def answers(self, jobs: list[Job]) -> Answers:
        if not jobs:
            return
        gates: AbstractContextManager = self.model.disable_adapter() if self.is_full else nullcontext()
        with evaluating(self.model), gates:
            cache = self.cache_of()
            if isinstance(cache, BoundedCache) and cache.why_rows_stay is None:
                answers = self._joining(jobs, cache)
            else:
                answers = self._in_batches(jobs, cache)
            for job, ids in answers:
                yield job.index, ids

    def _rows(self, rows: int, jobs: Sequence[Job]) -> AnswerRows:
        return AnswerRows(rows, max(job.most for job in jobs), self.eos, self.temperature, self.device)

    def _check_room(self, rows: int, jobs: Sequence[Job], cache: BoundedCache) -> None:
        row, most = row_bytes(self.base, cache.slots), max(job.most for job in jobs)
        each = row + 8 * most + 4 * text_config(self.base).vocab_size
        check_room("batch_size", rows, partial(mul, each), self.device, "for rows, answers and forecasts")

    def _chunk_size(self, job: Job) -> int | None:
        return None if self.is_full else chunk_size(self.prefill_chunk_size, len(job.ids), 0)

    def _waiting(self, jobs: list[Job], period: int) -> dict[int, deque[Job]]:
        """The jobs by their prompts' length modulo the period, long prompts first."""
        waiting: dict[int, deque[Job]] = {}
        for job in sorted(jobs, key=lambda job: -len(job.ids)):
            waiting.setdefault(len(job.ids) % period, deque()).append(job)
        return waiting

    def _next(self, queue: deque[Job], most: int, tokens: int = MOST_TOKENS) -> list[Job]:
        """The next prompts that are read together, at most so many; one that is read in chunks is read alone.

        Args:
            tokens: that are read at once, padding included, unless a single prompt has more.
        """
        chosen = [queue.popleft()]
        longest = len(chosen[0].ids)
        chunk = self._chunk_size(chosen[0])
        if chunk is None or longest <= chunk:
            most = min(most, max(1, tokens // longest))
            while queue and len(chosen) < most:
                chosen.append(queue.popleft())
        return chosen

    @torch.inference_mode()
    def _read(self, jobs: Sequence[Job], cache: Any, forward: Any) -> tuple[torch.Tensor, torch.Tensor]:
        """Logits [n, V] at the ends of prompts, which are padded on the left, and their mask [n, T]."""
        longest = max(len(job.ids) for job in jobs)
        ids = torch.tensor([[0] * (longest - len(job.ids)) + job.ids for job in jobs], device=self.device)
        lengths = torch.tensor([len(job.ids) for job in jobs], device=self.device)
        positions = torch.arange(longest, device=self.device) - (longest - lengths)[:, None]
        mask = (positions >= 0).long()
        positions = positions.clamp(min=0)
        # a batch that reads and writes in one cache tells prompts of one token from steps by their mask
        has_mask = forward is not self.model or any(len(job.ids) < longest for job in jobs)
        chunk = self._chunk_size(jobs[0]) or longest
        for first in range(0, longest, chunk):
            part = slice(first, first + chunk)
            output = forward(
                input_ids=ids[:, part],
                position_ids=positions[:, part],
                attention_mask=mask[:, : part.stop] if has_mask else None,
                past_key_values=cache,
                logits_to_keep=1,
            )
        return output.logits[:, -1], mask

    def _joining(self, jobs: list[Job], cache: BoundedCache) -> Iterator[tuple[Job, list[int]]]:
        """Answers in a batch whose rows go to the next prompts when theirs end."""
        count = min(self.batch_size, len(jobs))
        self._check_room(count, jobs, cache)
        rows, period = self._rows(count, jobs), max(layer.step_period for layer in cache.gated_layers)
        waiting = self._waiting(jobs, period)
        longest, column = max(len(job.ids) for job in jobs), 0
        ended: list[tuple[Job, list[int]]] = []
        with ExitStack() as stack:
            step = self._opened(stack, cache)
            self._step(step, rows, cache)  # allocates
            while True:
                if rows.is_idle and not any(waiting.values()):
                    yield from ended
                    return
                if rows.is_idle:  # a row that begins at a multiple of the period evicts as it does alone
                    residue = max(waiting, key=lambda r: len(waiting[r]))
                    column = longest + (residue - longest) % period
                    cache.reset()
                    cache.begin_at(column)
                queue = waiting.get(column % period, deque())
                has_room = column + rows.most <= MOST_TOKENS or rows.is_idle
                free = rows.free
                if queue and has_room and len(free) >= min(len(queue), max(1, count // FREE_SHARE)):
                    while queue and free:
                        self._join(self._next(queue, len(free), READ_TOKENS), free, rows, cache, column)
                        free = rows.free
                for _ in range(self._steps_to_go(waiting, column, period)):
                    self._step(step, rows, cache)
                    column += 1
                yield from ended  # while the device works
                ended = rows.finished()

    def _steps_to_go(self, waiting: dict[int, deque[Job]], column: int, period: int) -> int:
        """Until the next look: a column at which many of those that wait can join."""
        first = self.between_looks
        return max(range(first, first + period), key=lambda steps: len(waiting.get((column + steps) % period, ())))

    def _join(self, jobs: list[Job], free: list[int], rows: AnswerRows, cache: BoundedCache, column: int) -> None:
        prompt = self.cache_of()
        assert isinstance(prompt, BoundedCache)
        prompt.begin_at(column - max(len(job.ids) for job in jobs))
        logits, _ = self._read(jobs, prompt, self.model)
        self._place(jobs, free[: len(jobs)], rows, logits)
        with torch.inference_mode():
            cache.copy_rows(free[: len(jobs)], prompt, range(len(jobs)))

    @torch.inference_mode()
    def _place(self, jobs: list[Job], free: list[int], rows: AnswerRows, logits: torch.Tensor) -> None:
        rows.place(free, jobs, logits)

    def _opened(self, stack: ExitStack, cache: Any, prompt_columns: int = 0) -> Callable[..., Any]:
        """The model's forward pass, captured where it can be."""
        decode_step = getattr(cache, "decode_step", None)
        if decode_step is None:
            return lambda **arguments: self.base(**named_for(self.base.forward, arguments))
        return stack.enter_context(decode_step.opened(self.base, cache, prompt_columns))

    @torch.inference_mode()
    def _step(self, step: Callable[..., Any], rows: AnswerRows, cache: Any, mask: torch.Tensor | None = None) -> None:
        output = step(
            input_ids=rows.tokens[:, None],
            position_ids=rows.positions[:, None],
            attention_mask=mask,
            past_key_values=cache,
            logits_to_keep=1,
        )
        rows.take(output.logits[:, -1])

    def _in_batches(self, jobs: list[Job], cache: Any) -> Iterator[tuple[Job, list[int]]]:
        """Answers in batches that are padded on the left, one after the other."""
        layers = getattr(cache, "gated_layers", ())
        waiting = self._waiting(jobs, max((layer.step_period for layer in layers), default=1))
        used = 0  # rows that the cache has
        for queue in waiting.values():
            while queue:
                batch = self._next(queue, self.batch_size)
                if used == len(batch):
                    with torch.inference_mode():  # in which layers of transformers were filled
                        cache.reset()
                elif used:
                    cache = self.cache_of()
                used = len(batch) if isinstance(cache, BoundedCache) else -1
                yield from self._batch(batch, cache)

    def _batch(self, jobs: list[Job], cache: Any) -> Iterator[tuple[Job, list[int]]]:
        longest, most = max(len(job.ids) for job in jobs), max(job.most for job in jobs)
        rows = self._rows(len(jobs), jobs)
        with ExitStack() as stack:
            step = self._opened(stack, cache, longest)
            logits, mask = self._read(jobs, cache, step)
            self._place(jobs, list(range(len(jobs))), rows, logits)
            mask = torch.cat([mask, mask.new_ones(len(jobs), most)], dim=1)
            columns = longest
            while True:
                ended = rows.finished()
                if rows.is_idle:
                    yield from ended
                    return
                if self.is_full:
                    mask = self._without_ended(rows, cache, mask)
                for _ in range(min(self.between_looks, longest + most - columns)):
                    columns += 1
                    self._step(step, rows, cache, mask[:, :columns])
                yield from ended  # while the device works

    def _without_ended(self, rows: AnswerRows, cache: Any, mask: torch.Tensor) -> torch.Tensor:
        """The mask after rows that have ended are dropped, once they are an eighth: each step copies the cache."""
        going = [row for row, job in enumerate(rows.jobs) if job is not None]
        ended = len(rows.jobs) - len(going)
        if FREE_SHARE * ended < len(rows.jobs) or not all(hasattr(x, "batch_select_indices") for x in cache.layers):
            return mask
        with torch.inference_mode():
            kept = torch.tensor(going, device=self.device)
            cache.batch_select_indices(kept)
            rows.keep(going)
            return mask[kept]
