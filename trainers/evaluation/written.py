"""Scores what a model writes with each memory of bounded size, and with the full cache.

Answers are generated, greedily and one prompt at a time, through the cache that users have. Unlike the simulation in
`text.py` and `answers.py` this costs a forward pass per token, and answers of their own words can be scored.
"""

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from retention_gates.gates.adapter.families import text_config
from retention_gates.gates.adapter.model import RetentionGateModel, find_gated_model
from retention_gates.gates.adapter.modes import evaluating
from retention_gates.gates.cache.bounded_cache import BoundedCache
from retention_gates.trainers.evaluation.contenders import Contender, name_of

Progress = Callable[[int], Any]  # is told how many answers were written

# The likeliest token each time, whatever the model's generation_config.json asks for.
GREEDY: dict[str, Any] = {
    "do_sample": False,
    "num_beams": 1,
    "temperature": None,
    "top_p": None,
    "top_k": None,
    "repetition_penalty": 1.0,
    "no_repeat_ngram_size": 0,
}


class Question(Protocol):
    """A prompt in tokens, the longest answer, and the score of an answer in 0 to 1."""

    @property
    def task(self) -> str: ...

    @property
    def prompt_ids(self) -> list[int]: ...

    @property
    def max_new_tokens(self) -> int: ...

    def score(self, answer: str) -> float: ...


@torch.no_grad()
def compare_generations(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    questions: Sequence[Question],
    chosen: Sequence[Contender],
    *,
    max_new_tokens: int | None = None,
    prefill_chunk_size: int | None = None,
    seed: int = 0,
    progress: Progress = lambda count: None,
) -> list[dict[str, Any]]:
    """What each contender, and the full cache, answers: one record per question and contender.

    A record has `score`, the `answer`, and `new_tokens`, its length with the end-of-sequence token.

    Args:
        max_new_tokens: of every answer; None: what each question allows.
        prefill_chunk_size: tokens of a prompt read at a time by the bounded caches; None: all at once.
        seed: of policies that draw by chance.

    Raises:
        ValueError: for no question at all, one without a prompt, or one that the model has no positions for.
    """
    if not questions:
        raise ValueError("There is no question to answer: load some, with a larger limit perhaps.")
    if max_new_tokens is not None and max_new_tokens < 1:
        raise ValueError(f"max_new_tokens={max_new_tokens} must be 1 or more.")
    if any(contender.pin for contender in chosen):
        raise ValueError("Questions have no spans to pin: give contenders with pin=False.")
    gated = find_gated_model(model)
    longest = [max_new_tokens or question.max_new_tokens for question in questions]
    for index, (question, new_tokens) in enumerate(zip(questions, longest, strict=True)):
        _check_fits(gated, index, question, new_tokens)
    records = []
    rows: dict[str, int] = {}  # questions of each task so far
    with evaluating(model):
        for question, new_tokens in zip(questions, longest, strict=True):
            row = rows.get(question.task, 0)
            rows[question.task] = row + 1
            for contender in [None, *chosen]:
                ids = _generate(model, tokenizer, question, contender, new_tokens, prefill_chunk_size, seed)
                answer = str(tokenizer.decode(ids, skip_special_tokens=True))
                record = {"task": question.task, "row": row, **name_of(contender), "score": question.score(answer)}
                records.append(record | {"answer": answer, "new_tokens": len(ids)})
                progress(1)
    return records


def _generate(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    question: Question,
    contender: Contender | None,
    new_tokens: int,
    prefill_chunk_size: int | None,
    seed: int,
) -> list[int]:
    ids = torch.tensor([question.prompt_ids], device=model.device)
    end = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    options = GREEDY | {"attention_mask": torch.ones_like(ids), "max_new_tokens": new_tokens, "pad_token_id": end}
    if contender is None:
        with model.disable_adapter():
            output = model.generate(input_ids=ids, **options)
    else:
        cache = BoundedCache(
            model, contender.memory_size, policy=contender.policy, budgets=contender.budgets, seed=seed
        )
        if prefill_chunk_size is not None:
            options["prefill_chunk_size"] = prefill_chunk_size
        output = model.generate(input_ids=ids, past_key_values=cache, **options)
    return output[0, ids.shape[1] :].tolist()


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
