"""Scores every contender on every row, each of them once: what the store has is not computed again.

Rows of one task and length go through the model together, whatever their seeds. What a forward pass gives is stored at
once.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from operator import mul
from typing import Any

import torch
from torch import nn
from tqdm.auto import tqdm

from retention_gates.data.tasks.pitfalls import leaks
from retention_gates.gates.adapter.families import text_config
from retention_gates.gates.adapter.model import find_gated_model
from retention_gates.gates.adapter.placement import check_room, device_of
from retention_gates.recipes.comparison import fingerprints
from retention_gates.recipes.comparison.result_store import Records, ResultStore, Unit
from retention_gates.recipes.comparison.units import Units
from retention_gates.trainers.evaluation.answers import compare_answers, with_pinned
from retention_gates.trainers.evaluation.contenders import Contender, name_of
from retention_gates.trainers.evaluation.text import compare_rows


@dataclass(frozen=True)
class Block:
    """A group that is drawn together: rows of text or examples of a task, of one length and seed."""

    task: str
    length: int  # tokens
    seed: int
    items: Sequence[Any]  # token ids [length] each, or examples with prompt_ids and answer_ids
    start: int | None = None  # text: the first position whose forecast counts
    digests: list[str] = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "digests", [self._digest(item) for item in self.items])

    def _digest(self, item: Any) -> str:
        if self.start is not None:
            return fingerprints.of_value([item.tolist(), self.start])
        return fingerprints.of_value({name: value for name, value in vars(item).items() if name != "meta"})


Row = tuple[Block, int]  # and its index in the block


@dataclass
class Scorer:
    """One model, its contenders, and the store that their scores go to."""

    model: "nn.Module"
    chosen: "list[Contender]"
    store: ResultStore
    batch_size: int
    pin: bool = False  # of tasks with a system prompt: each contender once more with it pinned

    def __post_init__(self) -> None:
        self.units = Units(self.model)

    def score(self, blocks: Sequence[Block]) -> Records:
        """Records as `compare_rows` and `compare_answers` give them, with length and seed, block after block."""
        todo = self._missing(blocks)
        known = sum(len(block.items) * (1 + len(self._contenders(block))) for block in blocks)
        new = sum(len(rows) * (1 + len(contenders)) for rows, contenders in todo)
        if todo and self.store.found:
            print(f"{max(0, known - new)} of {known} scores are there already; {new} are computed.")
        with tqdm(total=new, desc="evaluating", unit="row", smoothing=0.05) as bar:
            for rows, contenders in todo:
                block, _ = rows[0]
                bar.set_postfix_str(f"{block.task}, {block.length} tokens", refresh=False)
                self._compute(rows, contenders, bar.update)
        records: Records = []
        for block in blocks:
            place = {"length": block.length, "seed": block.seed}
            for index in range(len(block.items)):
                for contender in (None, *self._contenders(block)):
                    stored = self.store.get(self._unit(block, index, contender))
                    assert stored is not None
                    own = [record | {"row": index} for record in stored]
                    records += [record | place for record in own + leaks(own)]
        return records

    def _check_room(self, rows: int, tokens: int) -> None:
        """Of a batch the hidden states of one contender must fit at least."""
        base = find_gated_model(self.model).model
        each = tokens * text_config(base).hidden_size * next(base.parameters()).itemsize
        check_room("batch_size", rows, partial(mul, each), device_of(base), "for the hidden states of their rows")

    def _contenders(self, block: Block) -> "list[Contender]":
        return with_pinned(self.chosen, block.items) if self.pin and block.start is None else self.chosen

    def _missing(self, blocks: Sequence[Block]) -> "list[tuple[list[Row], list[Contender]]]":
        """Batches of rows of one task and length, with the contenders that any of these still needs."""
        alike: dict[tuple, list[Row]] = {}
        for block in blocks:
            rows = alike.setdefault((block.task, block.length, block.start), [])
            rows += [(block, index) for index in range(len(block.items))]
        batches = []
        for rows in alike.values():
            self._check_room(min(self.batch_size, len(rows)), rows[0][0].length)
            for first in range(0, len(rows), self.batch_size):
                some = rows[first : first + self.batch_size]
                lacking = {}  # in the order of the contenders
                for contender in dict.fromkeys(c for block, _ in some for c in (None, *self._contenders(block))):
                    lacking[contender] = any(self.store.get(self._unit(*row, contender)) is None for row in some)
                if any(lacking.values()):
                    batches.append((some, [one for one, lacks in lacking.items() if lacks and one is not None]))
        return batches

    def _compute(self, rows: "list[Row]", contenders: "list[Contender]", progress: Callable[[int], Any]) -> None:
        named = {tuple(name_of(contender).values()): contender for contender in (None, *contenders)}

        def found(records: Records) -> None:
            units: dict[tuple, Records] = {}
            for record in records:
                name = (record["policy"], record["memory_size"], record["budgets"])
                units.setdefault((record["row"], name), []).append(record)
            results = []
            for (row, name), own in units.items():
                block, index = rows[row]
                results.append((self._unit(block, index, named[name]), own))
            self.store.add(results)

        block, _ = rows[0]
        items, seeds = [block.items[index] for block, index in rows], [block.seed for block, _ in rows]
        options: dict[str, Any] = {"batch_size": len(items), "seed": seeds, "progress": progress, "found": found}
        if block.start is not None:
            compare_rows(self.model, torch.stack(items), contenders, start=block.start, **options)
        else:
            compare_answers(self.model, block.task, items, contenders, **options)

    def _unit(self, block: Block, index: int, contender: "Contender | None") -> Unit:
        return self.units.of(contender, task=block.task, tokens=block.digests[index], seed=block.seed)
