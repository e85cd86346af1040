"""Scores memories of bounded size on the answers of recall tasks, as `text.py` does on text."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any, Protocol

import torch
from torch import nn

from retention_gates.gates.adapter.model import find_gated_model
from retention_gates.trainers.evaluation.contenders import Contender, name_of
from retention_gates.trainers.evaluation.forward_passes import (
    Progress,
    Records,
    check_length,
    hidden_states,
    row_seeds,
)
from retention_gates.trainers.output_head import OutputHead


def with_pinned(chosen: Sequence[Contender], examples: Sequence["Example"]) -> list[Contender]:
    """The contenders and, if the examples have spans to pin, each once more with these pinned."""
    if not any(_pinned(example) for example in examples):
        return list(chosen)
    return [*chosen, *(replace(contender, pin=True) for contender in chosen)]


class Example(Protocol):
    """An example of a recall task: token ids of the prompt, and of the answer that belongs behind it.

    It may also have `parts`, named spans of the answer, outside of which nothing is scored; and `pinned`, spans of the
    prompt for contenders that pin.
    """

    @property
    def prompt_ids(self) -> list[int]: ...

    @property
    def answer_ids(self) -> list[int]: ...


@torch.no_grad()
def compare_answers(
    model: nn.Module,
    task: str,
    examples: Sequence[Example],
    chosen: Sequence[Contender],
    *,
    batch_size: int = 1,
    seed: int | Sequence[int] = 0,
    progress: Progress = lambda count: None,
    found: Callable[[Records], Any] = lambda records: None,
) -> Records:
    """Whether each contender, and the full cache, would say the answer: one record per example and contender.

    Teacher-forced: the answer is part of the input, and each of its tokens must be the most likely one after what came
    before. A record has `token_accuracy`, the share of such tokens; `exact`, 1.0 if all are; and `said`, the ids of
    the most likely tokens. Each part of an example is scored once more, in a record of the task "TASK/PART". Seed,
    progress and found are as in `compare_rows`.

    Raises:
        ValueError: for examples without prompt or answer, or longer than the model has positions for, and for
            contenders that pin where an example has nothing to pin.
    """
    gated = find_gated_model(model)
    head = OutputHead.from_model(model)
    records: Records = []
    for indices in _batches_of_equal_length(examples, batch_size):
        batch = [examples[i] for i in indices]
        ids = torch.tensor([example.prompt_ids + example.answer_ids for example in batch], device=head.device)
        check_length(gated, ids.shape[1])
        seeds, pinned = row_seeds(seed, indices), _pinned(batch[0])
        for some, kept in hidden_states(model, ids, chosen, seeds, progress, pinned):
            new = [
                record | name_of(contender)
                for contender, hidden in zip(some, kept, strict=True)
                for row, index in enumerate(indices)
                for record in _score_answer(head, task, index, batch[row], hidden[row], ids[row])
            ]
            found(new)
            records += new
    return records


def _score_answer(
    head: OutputHead, task: str, index: int, example: Example, hidden: torch.Tensor, ids: torch.Tensor
) -> Iterator[dict[str, Any]]:
    """Records of the whole answer and its parts; hidden is [T, C], ids [T]."""
    answer = slice(len(example.prompt_ids), None)
    forecast = head.logits(hidden[answer.start - 1 : -1]).argmax(-1)
    right = forecast == ids[answer]
    parts = {f"{task}/{part}": right[slice(*span)] for part, span in _parts(example).items()}
    for name, tokens in {task: torch.cat([*parts.values()]) if parts else right, **parts}.items():
        share = tokens.double().mean().item()
        said = {"said": forecast.tolist()} if name == task else {}
        yield {"task": name, "row": index, "token_accuracy": share, "exact": float(share == 1.0), **said}


def _parts(example: Example) -> dict[str, tuple[int, int]]:
    return getattr(example, "parts", {})


def _pinned(example: Example) -> tuple[tuple[int, int], ...]:
    return getattr(example, "pinned", ())


def _batches_of_equal_length(examples: Sequence[Example], batch_size: int) -> Iterator[list[int]]:
    """Indices of examples that need no padding beside each other and would pin the same positions."""
    by_length: dict[tuple, list[int]] = {}
    for index, example in enumerate(examples):
        if not example.prompt_ids or not example.answer_ids:
            raise ValueError(f"Example {index} has no prompt or no answer: there is nothing to score.")
        length = len(example.prompt_ids) + len(example.answer_ids)
        by_length.setdefault((length, _pinned(example)), []).append(index)
    for indices in by_length.values():
        for first in range(0, len(indices), batch_size):
            yield indices[first : first + batch_size]
