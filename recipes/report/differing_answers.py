"""Examples of recall tasks on which contenders answer differently, in words."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedTokenizerBase

from retention_gates.recipes.comparison.scoring import Block
from retention_gates.recipes.report.contents import FULL_CACHE, contender_name

QUESTION_TOKENS = 60  # of the prompt's end that are shown
EACH = 2  # examples of each task and length


@dataclass
class Answers:
    """One example, and what each contender would say: pieces of text, and whether each is what was asked for."""

    task: str
    length: int
    memory_size: int
    question: str  # the prompt's end
    expected: str
    said: list[tuple[str, list[tuple[str, bool]], float]]  # contender, pieces, share of tokens that are right


def differing_answers(
    records: Sequence[dict[str, Any]], blocks: "Sequence[Block]", tokenizer: "PreTrainedTokenizerBase"
) -> list[Answers]:
    """Of each task and length the examples on which scores differ most, at the middle memory size."""
    sizes = sorted({record["memory_size"] for record in records} - {None})
    size = sizes[(len(sizes) - 1) // 2]
    said: dict[tuple, list[dict[str, Any]]] = {}
    for record in records:
        if record["memory_size"] in (None, size) and "said" in record:
            said.setdefault((record["task"], record["length"], record["seed"], record["row"]), []).append(record)
    found: dict[tuple[str, int], list[Answers]] = {}
    for block in blocks:
        for row, example in enumerate(block.items):
            own = said.get((block.task, block.length, block.seed, row))
            if own is None:
                continue
            pieces = _answers(block, example, own, size, tokenizer)
            if len({share for _, _, share in pieces.said}) > 1:
                found.setdefault((block.task, block.length), []).append(pieces)
    return [answers for some in found.values() for answers in sorted(some, key=_spread, reverse=True)[:EACH]]


def _answers(
    block: "Block", example: Any, records: list[dict[str, Any]], size: int, tokenizer: "PreTrainedTokenizerBase"
) -> Answers:
    def words(ids: Sequence[int]) -> str:
        return str(tokenizer.decode(list(ids), clean_up_tokenization_spaces=False))

    said = []
    for record in records:
        name = contender_name(record["policy"], record["budgets"])
        pairs = zip(record["said"], example.answer_ids, strict=True)
        said.append((name, [(words([token]), token == right) for token, right in pairs], record["token_accuracy"]))
    question, expected = words(example.prompt_ids[-QUESTION_TOKENS:]), words(example.answer_ids)
    said.sort(key=lambda each: (each[0] != contender_name(FULL_CACHE, None), -each[2]))
    return Answers(block.task, block.length, size, question, expected, said)


def _spread(answers: Answers) -> float:
    shares = [share for _, _, share in answers.said]
    return max(shares) - min(shares)
