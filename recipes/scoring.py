"""Scores every contender on every row, each of them once: what the store has is not computed again."""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

from retention_gates.recipes import fingerprints
from retention_gates.recipes.provenance import PACKAGES, machine_and_versions
from retention_gates.recipes.result_store import Records, ResultStore, Unit

if TYPE_CHECKING:
    from torch import nn

    from retention_gates.trainers.evaluation import Contender


@dataclass(frozen=True)
class Block:
    """What is drawn together: rows of text or examples of a task, of one length and seed."""

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


@dataclass
class Scorer:
    """One model, its contenders, and the store that their scores go to."""

    model: "nn.Module"
    chosen: "list[Contender]"
    store: ResultStore
    batch_size: int
    pin: bool = False  # of tasks with a system prompt: each contender once more with it pinned

    def __post_init__(self) -> None:
        from retention_gates.gates.model import find_gated_model

        machine = machine_and_versions(self.model)
        self.digests = fingerprints.of_model(self.model)
        self.setup = {name: machine[name] for name in (*PACKAGES, "dtype")}
        # how many threads there are changes no more than rounding
        self.setup |= {"device": machine["device"].split(",")[0], "code": fingerprints.of_code()}
        self.setup |= {"base": self.digests.base}
        self.protected = find_gated_model(self.model).active_config.protected_tokens

    def score(self, blocks: Sequence[Block]) -> Records:
        """Records as `compare_rows` and `compare_answers` give them, with length and seed, block after block."""
        from tqdm.auto import tqdm

        from retention_gates.data.tasks.pitfalls import leaks

        todo = [batch for block in blocks for batch in self._missing(block)]
        known = sum(len(block.items) * (1 + len(self._contenders(block))) for block in blocks)
        new = sum(len(indices) * (1 + len(contenders)) for _, indices, contenders in todo)
        if todo and self.store.found:
            print(f"{max(0, known - new)} of {known} scores are there already; {new} are computed.")
        with tqdm(total=new, desc="evaluating", unit="row", smoothing=0.05) as bar:
            for block, indices, contenders in todo:
                bar.set_postfix_str(f"{block.task}, {block.length} tokens, seed {block.seed}", refresh=False)
                self.store.add(self._compute(block, indices, contenders, bar.update))
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

    def _contenders(self, block: Block) -> "list[Contender]":
        from retention_gates.trainers.evaluation import with_pinned

        return with_pinned(self.chosen, block.items) if self.pin and block.start is None else self.chosen

    def _missing(self, block: Block) -> "list[tuple[Block, list[int], list[Contender]]]":
        """Batches of rows, with the contenders that any of these still needs."""
        batches = []
        for first in range(0, len(block.items), self.batch_size):
            indices = list(range(first, min(first + self.batch_size, len(block.items))))
            lacking = [
                contender
                for contender in (None, *self._contenders(block))
                if any(self.store.get(self._unit(block, index, contender)) is None for index in indices)
            ]
            if lacking:
                batches.append((block, indices, [contender for contender in lacking if contender is not None]))
        return batches

    def _compute(
        self, block: Block, indices: list[int], contenders: "list[Contender]", progress: Callable[[int], Any]
    ) -> list[tuple[Unit, Records]]:
        import torch

        from retention_gates.trainers.evaluation import compare_answers, compare_rows

        items = [block.items[index] for index in indices]
        options: dict[str, Any] = {"batch_size": len(items), "seed": block.seed, "progress": progress}
        if block.start is not None:
            records = compare_rows(self.model, torch.stack(items), contenders, start=block.start, **options)
        else:
            records = compare_answers(self.model, block.task, items, contenders, **options)
        found: dict[int, dict[tuple, Records]] = {}  # of each row: contenders in their order, the full cache first
        for record in records:
            name = (record["policy"], record["memory_size"], record["budgets"])
            found.setdefault(record["row"], {}).setdefault(name, []).append(record)
        return [
            (self._unit(block, index, contender), own)
            for row, index in enumerate(indices)
            for contender, own in zip([None, *contenders], found[row].values(), strict=True)
        ]

    def _unit(self, block: Block, index: int, contender: "Contender | None") -> Unit:
        """All that the score depends on; the full cache and policies without gates don't depend on the gates."""
        from retention_gates.gates.policies import find_policy

        unit = {**self.setup, "task": block.task, "tokens": block.digests[index], "seed": block.seed}
        if contender is None:
            return unit
        if find_policy(contender.policy).needs_gates or contender.budgets != "uniform":
            unit["gates"] = self.digests.gates
        return unit | {"contender": asdict(contender), "protected": self.protected}
