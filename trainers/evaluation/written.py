"""Scores what a model writes with each memory of bounded size, and with the full cache.

Answers are generated through the cache that users have, many at a time. Unlike the simulation in `text.py` and
`answers.py` this costs a forward pass per token, and answers of their own words can be scored.
"""

import hashlib
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from operator import mul
from typing import Any, Protocol

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from retention_gates.gates.adapter.families import text_config
from retention_gates.gates.adapter.model import RetentionGateModel, find_gated_model
from retention_gates.gates.adapter.placement import check_room
from retention_gates.gates.cache.bounded_cache import BoundedCache
from retention_gates.trainers.evaluation.answer_batches import answer_prompts, ending_tokens
from retention_gates.trainers.evaluation.contenders import Contender, name_of

Record = dict[str, Any]
ANSWER_BYTES = 500  # that a question's record takes at least, with what asks for it
REPEATS, LEAST_REPEATED = 4, 32  # a loop: so many times the same at an answer's end, together so many tokens


class Question(Protocol):
    """A prompt in tokens, the longest answer, and the score of an answer in 0 to 1."""

    @property
    def task(self) -> str: ...

    @property
    def prompt_ids(self) -> list[int]: ...

    @property
    def max_new_tokens(self) -> int: ...

    def score(self, answer: str) -> float: ...


@dataclass(frozen=True)
class Ask:
    """One answer to one question."""

    index: int  # of the question
    row: int  # of the question, among those of its task
    contender: Contender | None  # None: the full cache
    sample: int = 0


@dataclass(frozen=True)
class Effort:
    """The cost of one contender's answers, without those that were known before."""

    contender: Contender | None
    answers: int
    tokens: int
    seconds: float


def compare_generations(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    questions: Sequence[Question],
    chosen: Sequence[Contender],
    *,
    batch_size: int = 1,
    samples: int = 1,
    temperature: float = 0.0,
    max_new_tokens: int | None = None,
    prefill_chunk_size: int | None = None,
    seed: int = 0,
    known: Callable[[Ask], Record | None] = lambda ask: None,
    found: Callable[[Ask, Record], Any] = lambda ask, record: None,
    spent: Callable[[Effort], Any] = lambda effort: None,
) -> list[Record]:
    """Writes and scores the answers of the full cache and each contender: a record per question, contender and sample.

    A record has `score`, the `answer`, `new_tokens`, its length with the end-of-sequence token, `is_cut`, whether it
    had not ended by then, and `loops`, whether its end says the same again and again.

    Args:
        batch_size: answers that are written at a time.
        samples: answers to each question, drawn at a temperature above 0. All contenders draw from the same random
            numbers.
        temperature: 0 takes the likeliest token.
        max_new_tokens: of every answer; None: what each question allows.
        prefill_chunk_size: tokens of a prompt read at a time by the bounded caches; None: all at once.
        seed: of drawn answers, and of policies that draw by chance.
        known: gives the record of an answer that is there already, which is scored anew.
        found: gets each other record as it comes.
        spent: is told once of each contender.

    Raises:
        ValueError: for no question at all, one without a prompt, one that the model has no positions for, and samples
            without a temperature.
    """
    if not questions:
        raise ValueError("There is no question to answer: load some, with a larger limit perhaps.")
    if max_new_tokens is not None and max_new_tokens < 1:
        raise ValueError(f"max_new_tokens={max_new_tokens} must be 1 or more.")
    if any(contender.pin for contender in chosen):
        raise ValueError("Questions have no spans to pin: give contenders with pin=False.")
    check_samples(samples, temperature)
    check_sample_room(samples, len(questions) * (1 + len(chosen)))
    gated = find_gated_model(model)
    longest = [max_new_tokens or question.max_new_tokens for question in questions]
    for index, (question, new_tokens) in enumerate(zip(questions, longest, strict=True)):
        _check_fits(gated, index, question, new_tokens)
    endings = ending_tokens(model)
    records: dict[Ask, Record] = {}
    for contender in [None, *chosen]:
        asks = _asks(questions, contender, samples)
        missing = []
        for ask in asks:
            if (record := known(ask)) is None:
                missing.append(ask)
            else:
                records[ask] = record | {"score": questions[ask.index].score(record["answer"])}
        clock, tokens = time.monotonic(), 0
        answers = answer_prompts(
            model,
            [questions[ask.index].prompt_ids for ask in missing],
            cache_of=None if contender is None else _cache_of(model, contender, seed),
            batch_size=batch_size,
            max_new_tokens=[longest[ask.index] for ask in missing],
            temperature=temperature,
            seed=[_seed(seed, questions[ask.index].task, ask) for ask in missing],
            prefill_chunk_size=prefill_chunk_size,
        )
        for number, ids in answers:
            ask = missing[number]
            question = questions[ask.index]
            answer = str(tokenizer.decode(ids, skip_special_tokens=True))
            record = {"task": question.task, "row": ask.row, **name_of(contender), "score": question.score(answer)}
            if samples > 1:
                record["sample"] = ask.sample
            record |= {"answer": answer, "new_tokens": len(ids)}
            records[ask] = record | {"is_cut": ids[-1] not in endings, "loops": loops(ids)}
            tokens += len(ids)
            found(ask, records[ask])
        spent(Effort(contender, len(missing), tokens, time.monotonic() - clock))
    order = {contender: place for place, contender in enumerate([None, *chosen])}
    return [records[ask] for ask in sorted(records, key=lambda ask: (ask.index, order[ask.contender], ask.sample))]


def check_samples(samples: int, temperature: float) -> None:
    """Raises ValueError for numbers out of range, and for several samples that would all be alike."""
    if samples < 1:
        raise ValueError(f"samples={samples} must be 1 or more.")
    if not 0 <= temperature < float("inf"):
        raise ValueError(f"temperature={temperature} must be 0, for the likeliest token, or above, and finite.")
    if samples > 1 and temperature == 0:
        raise ValueError(
            f"samples={samples} of the likeliest tokens would all be alike: give a temperature above 0, or one sample."
        )


def check_sample_room(samples: int, questions: int) -> None:
    """Raises ValueError for more samples to so many questions than the host has memory for."""
    why = f"for a record of each answer to {questions:,} questions"
    check_room("samples", samples, partial(mul, ANSWER_BYTES * questions), torch.device("cpu"), why)


def loops(ids: Sequence[int]) -> bool:
    """Whether an answer's last tokens are some tokens four times in a row, 32 tokens or more in all."""
    for period in range(1, len(ids) // REPEATS + 1):
        length = max(REPEATS * period, -(-LEAST_REPEATED // period) * period)
        if length <= len(ids) and ids[-length:-period] == ids[len(ids) - length + period :]:
            return True
    return False


def _asks(questions: Sequence[Question], contender: Contender | None, samples: int) -> list[Ask]:
    rows: dict[str, int] = {}  # questions of each task so far
    asks = []
    for index, question in enumerate(questions):
        row = rows.get(question.task, 0)
        rows[question.task] = row + 1
        asks += [Ask(index, row, contender, sample) for sample in range(samples)]
    return asks


def _cache_of(model: nn.Module, contender: Contender, seed: int) -> Callable[[], BoundedCache]:
    return lambda: BoundedCache(
        model, contender.memory_size, policy=contender.policy, budgets=contender.division, seed=seed
    )


def _seed(seed: int, task: str, ask: Ask) -> int:
    """The same for all contenders, so that differences between them are not those of chance alone."""
    said = f"{seed} {task} {ask.row} {ask.sample}".encode()
    return int.from_bytes(hashlib.sha256(said).digest()[:8], "big")


def _check_fits(gated: RetentionGateModel, index: int, question: Question, new_tokens: int) -> None:
    length = len(question.prompt_ids)
    if not length:
        raise ValueError(f"Question {index} of {question.task} has no prompt.")
    most = getattr(text_config(gated.model), "max_position_embeddings", None)
    if most is not None and length + new_tokens > most:
        raise ValueError(
            f"Question {index} of {question.task} has a prompt of {length} tokens and an answer of {new_tokens}, "
            f"but the model has {most} positions: shorten prompts with longest_prompt or answers with max_new_tokens, "
            "or take a model with a longer context."
        )
