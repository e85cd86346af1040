"""The common part of the recall tasks: examples of an exact length, made from a seed and filler text."""

import zlib
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from retention_gates.data.packing import NO_TARGET, Row
from retention_gates.data.tokens import TokenDocument, document_prefix

Split = Literal["train", "test"]


Span = tuple[int, int]  # tokens start..stop-1


@dataclass(frozen=True)
class TaskExample:
    """A prompt and the answer that the model should give token by token; `meta` says what was hidden, and where.

    Args:
        parts: spans of the answer that are scored, each also by itself under its name; what lies between them, such as
            a further question, is only read. Empty: the whole answer is scored.
        pinned: spans of the prompt that a user would pin, such as a system prompt; see `BoundedCache.pin`.
    """

    prompt_ids: list[int]
    answer_ids: list[int]
    meta: dict[str, Any] = field(default_factory=dict)
    parts: dict[str, Span] = field(default_factory=dict)
    pinned: tuple[Span, ...] = ()


class Filler:
    """Text to hide things in: windows of the given documents, and the tokenizer for what is hidden."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, documents: Sequence[TokenDocument]) -> None:
        self.tokenizer = tokenizer
        self.prefix = document_prefix(tokenizer)
        bodies = [document.ids[self._opening(document.ids) :] for document in documents]
        self.bodies = [body for body in bodies if len(body)]
        if not self.bodies:
            raise ValueError("a recall task needs filler text and got none: the list of token documents is empty")
        self.total = sum(map(len, self.bodies))

    def encode(self, text: str) -> list[int]:
        """Ids of a piece of text, without special tokens."""
        return self.tokenizer.encode(text, add_special_tokens=False)

    def decode(self, ids: Sequence[int]) -> str:
        """The text of token ids, space for space."""
        return str(self.tokenizer.decode(list(ids), clean_up_tokenization_spaces=False))

    def window(self, rng: np.random.Generator, count: int) -> list[int]:
        """`count` tokens that follow each other in one document; short documents are laid end to end.

        Raises:
            ValueError: the documents have fewer tokens.
        """
        if count > self.total:
            raise ValueError(
                f"a recall task needs {count} tokens of filler text and the documents have {self.total}; "
                "choose a shorter length or add documents"
            )
        long_enough = [body for body in self.bodies if len(body) >= count]
        if long_enough:
            places = np.array([len(body) - count + 1 for body in long_enough])
            body = long_enough[int(rng.choice(len(places), p=places / places.sum()))]
            start = int(rng.integers(len(body) - count + 1))
            return body[start : start + count].tolist()
        order = rng.permutation(len(self.bodies))
        return np.concatenate([self.bodies[i] for i in order])[:count].tolist()

    def _opening(self, ids: np.ndarray) -> int:
        size = len(self.prefix)
        return size if size and ids[:size].tolist() == self.prefix else 0


@dataclass(frozen=True)
class Task(ABC):
    """A recall task. Example i of a seed, length and split is the same whatever else is asked for.

    A task's fields set how hard it is; its length in tokens is chosen when examples are made.
    """

    kind: ClassVar[str]

    @property
    def name(self) -> str:
        """The name that `build_task` takes: the kind, and each setting that is not the usual one."""
        changed = [(f.name, getattr(self, f.name)) for f in fields(self) if getattr(self, f.name) != f.default]
        return self.kind + (":" if changed else "") + ",".join(f"{name}={value}" for name, value in changed)

    @abstractmethod
    def build(self, filler: Filler, rng: np.random.Generator, length: int, split: Split) -> TaskExample:
        """One example of exactly `length` tokens, prompt and answer together."""

    def build_for_training(self, filler: Filler, rng: np.random.Generator, length: int) -> list[int]:
        """The `length` tokens of one training row."""
        example = self.build(filler, rng, length, "train")
        return example.prompt_ids + example.answer_ids

    def examples(
        self,
        tokenizer: PreTrainedTokenizerBase,
        filler_documents: Sequence[TokenDocument],
        count: int,
        length: int,
        seed: int,
        split: Split = "train",
    ) -> list[TaskExample]:
        """`count` examples, each of exactly `length` tokens, so that they batch without padding.

        The two splits share no names and codes. Passages come from the filler: give the train documents for one split
        and the test documents for the other.

        Raises:
            ValueError: an unknown split, a count below 1, or a length or filler too short for the task.
        """
        if split not in ("train", "test"):
            raise ValueError(f"split={split!r}; a task's split is 'train' or 'test'")
        if count < 1:
            raise ValueError(f"count={count} examples; ask for 1 or more")
        filler = Filler(tokenizer, filler_documents)
        result = [self.build(filler, self.generator(seed, split, index), length, split) for index in range(count)]
        assert all(len(example.prompt_ids) + len(example.answer_ids) == length for example in result)
        return result

    def training_row(self, filler: Filler, row_length: int, seed: int, index: int) -> Row:
        """Row `index` of the training mix: one document whose every token is a target but the first."""
        ids = torch.tensor(self.build_for_training(filler, self.generator(seed, "train", index), row_length))
        assert len(ids) == row_length
        labels = ids.clone()
        labels[: max(1, len(filler.prefix))] = NO_TARGET
        return {"input_ids": ids, "position_ids": torch.arange(row_length), "labels": labels}

    def generator(self, seed: int, split: Split, index: int) -> np.random.Generator:
        """Random numbers of one example."""
        return np.random.default_rng([seed, zlib.crc32(f"{self.name}/{split}".encode()), index])

    def filler_room(self, length: int, used: int, *, least: int = 16) -> int:
        """Tokens left for filler.

        Raises:
            ValueError: fewer than `least`.
        """
        if length - used < least:
            raise ValueError(
                f"length={length} tokens is too short for the task {self.name!r}, which needs {used + least} or more "
                "with this tokenizer; choose longer rows or leave the task out"
            )
        return length - used


def check_setting(task: str, name: str, value: float, least: float, most: float) -> None:
    """Raises ValueError for a task's setting outside its range."""
    if not least <= value <= most:
        raise ValueError(f"{task}: {name}={value} must lie between {least} and {most}")


def check_depth(task: str, depth: float | None) -> None:
    """Raises ValueError for a depth outside 0 (the text's beginning) to 1 (its end)."""
    if depth is not None:
        check_setting(task, "depth", depth, 0, 1)


def scatter(text: list[int], pieces: Sequence[list[int]], places: Sequence[int]) -> list[int]:
    """The text with each piece put in before its token number `place`; of two at one place, the first comes first."""
    row: list[int] = []
    start = 0
    for place, piece in sorted(zip(places, pieces, strict=True), key=lambda pair: pair[0]):
        row += text[start:place] + piece
        start = place
    return row + text[start:]


def draw_code(rng: np.random.Generator, split: Split) -> str:
    """Five digits; a code whose digits add up to a multiple of five is for tests, any other for training."""
    while True:
        digits = rng.integers(0, 10, size=5)
        if (int(digits.sum()) % 5 == 0) == (split == "test"):
            return "".join(map(str, digits))


def encode_after_space(filler: Filler, before: str, answer: str) -> tuple[list[int], list[int]]:
    """Ids of `before` with the space behind it, and of `answer`.

    Most tokenizers glue a space to the word after it but not to a digit. So a space that is a token by itself belongs
    to the question: the answer must be the same tokens wherever it stands, and only them.
    """
    ids = filler.encode(" " + answer)
    spaces = 0
    while spaces < len(ids) - 1 and not filler.decode(ids[: spaces + 1]).strip():
        spaces += 1
    return filler.encode(before) + ids[:spaces], ids[spaces:]


def encode_list(filler: Filler, before: str, answers: Sequence[str]) -> tuple[list[int], list[int]]:
    """Ids of `before`, and of the answers with commas between them; spaces as in `encode_after_space`."""
    question, ids = encode_after_space(filler, before, answers[0])
    for answer in answers[1:]:
        comma, more = encode_after_space(filler, ",", answer)
        ids = ids + comma + more
    return question, ids
