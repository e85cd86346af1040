"""Scores memories of bounded size against the full cache, exactly as a bounded cache would evict, without decoding.

Every score comes from one forward pass through a `SimulatedCache`, several contenders side by side: what each head
holds at every step is what a token-by-token decode with `BoundedCache` would hold. The full cache is the base model
itself, gates off.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Any, Protocol

import torch
from torch import nn

from retention_gates.gates.budgets import BUDGETS
from retention_gates.gates.families import text_config
from retention_gates.gates.head import OutputHead
from retention_gates.gates.model import RetentionGateModel, find_gated_model
from retention_gates.gates.policies import FeedbackPolicy, Policy, ScoredPolicy, find_policy
from retention_gates.gates.simulation import SimulatedCache

FULL_CACHE = "full"
TEXT = "text"
# tokens whose logits exist at a time, on a CPU and on a GPU: with the largest vocabulary, 256 are 256 MiB in fp32
LOGITS_CHUNK = (256, 2048)
# tokens that go through the model at a time, contenders side by side, on a CPU and at most on a GPU: with more of them
# a simulated step costs each less, and steps of several policies run at the same time
TOKENS_AT_A_TIME = (2**15, 2**21)

Progress = Callable[[int], Any]  # is told how many forward passes x rows were done
Records = list[dict[str, Any]]


@dataclass(frozen=True)
class Contender:
    """One memory to be scored: who is evicted, how much is kept, and how it is divided.

    Args:
        pin: pin the spans that an example asks for, such as its system prompt; records call the policy "NAME+pin".
    """

    policy: str | Policy  # its name, or itself
    memory_size: int  # mean entries per KV head
    budgets: str = "uniform"
    pin: bool = False

    def __post_init__(self) -> None:
        policy = find_policy(self.policy)
        if self.budgets not in BUDGETS:
            raise ValueError(f"budgets={self.budgets!r} is unknown: choose among {', '.join(map(repr, BUDGETS))}.")
        if isinstance(policy, FeedbackPolicy) and policy.needs_instruction:
            raise ValueError(
                f"Policy {policy.name!r} needs an instruction, and contenders get texts and prompts without one: "
                "leave it out, or try it with BoundedCache and pin."
            )
        if self.budgets == "adaptive" and isinstance(policy, FeedbackPolicy) and policy.same_for_all_heads:
            raise ValueError(
                f"Policy {policy.name!r} evicts the same tokens in all heads of a layer, which cannot have adaptive "
                "budgets: give it uniform ones."
            )
        if self.budgets == "calibrated" and not policy.needs_gates:
            raise ValueError(
                f"Calibrated budgets follow what the gates retain, which policy {policy.name!r} does not look at: "
                "give it uniform budgets."
            )


def contenders(policies: Sequence[str], memory_sizes: Sequence[int], budgets: Sequence[str]) -> list[Contender]:
    """All combinations that have a meaning: calibrated budgets go to policies of trained gates only, adaptive ones not
    to a policy that evicts alike in all heads.

    Raises:
        ValueError: for an unknown or repeated name, and for a policy that is left without any budgets.
    """
    for name, values in (("policies", policies), ("memory sizes", memory_sizes), ("budgets", budgets)):
        if len(set(values)) != len(values):
            raise ValueError(f"The {name} {list(values)} name one twice: name each once.")
    chosen = []
    for policy in policies:
        fitting = [b for b in budgets if _fits(find_policy(policy), b)]
        if not fitting:
            raise ValueError(
                f"Policy {policy!r} has no use for budgets {list(budgets)}: add 'uniform', or leave it out."
            )
        chosen += [Contender(policy, size, division) for division in fitting for size in memory_sizes]
    if not chosen:
        raise ValueError("Nothing to compare: name at least one policy, one memory size and one kind of budgets.")
    return chosen


def _fits(policy: Policy, budgets: str) -> bool:
    if budgets == "calibrated":
        return policy.needs_gates
    if budgets == "global":
        return isinstance(policy, ScoredPolicy)
    return budgets != "adaptive" or not (isinstance(policy, FeedbackPolicy) and policy.same_for_all_heads)


def with_pinned(chosen: Sequence[Contender], examples: Sequence["Example"]) -> list[Contender]:
    """The contenders and, if the examples have spans to pin, each once more with these pinned."""
    if not any(_pinned(example) for example in examples):
        return list(chosen)
    return [*chosen, *(replace(contender, pin=True) for contender in chosen)]


@torch.no_grad()
def compare_rows(
    model: nn.Module,
    rows: torch.Tensor,
    chosen: Sequence[Contender],
    *,
    start: int = 0,
    batch_size: int = 1,
    seed: int | Sequence[int] = 0,
    progress: Progress = lambda count: None,
    found: Callable[[Records], Any] = lambda records: None,
) -> Records:
    """What each contender loses to the full cache on text: one record per row and contender, the full cache included.

    A record has `kl`, the mean KL(full || contender) in nats per token; `nll` and `full_nll`, the mean negative log
    likelihood of the next token; and `agreement`, the share of tokens whose most likely successor is the same.

    Args:
        rows: token ids [R, T], one document each.
        start: the first position whose forecast counts.
        seed: of policies that draw by chance, for all rows or for each one.
        found: is given what is known after each forward pass, all records of some contenders and rows.

    Raises:
        ValueError: for rows that the model has no positions for, or too short to score.
    """
    gated = find_gated_model(model)
    length = rows.shape[1]
    check_length(gated, length)
    if not 0 <= start < length - 1:
        raise ValueError(
            f"start={start} leaves nothing to score in rows of {length} tokens: choose 0 to {length - 2}."
        )
    head = OutputHead.from_model(model)
    records: Records = []
    for first in range(0, len(rows), batch_size):
        ids = rows[first : first + batch_size].to(head.device)
        targets, full = ids[:, start + 1 :], None
        for some, kept in _hidden_states(model, ids, chosen, _seeds(seed, range(first, first + len(ids))), progress):
            if full is None:
                full = kept[0]
            scores = _score_text(head, full[:, start:], [hidden[:, start:] for hidden in kept], targets)
            new = [
                {"task": TEXT, "row": first + row, **name_of(contender)}
                | {name: scores[name][index, row].item() for name in ("kl", "nll", "agreement")}
                | {"full_nll": scores["full_nll"][row].item()}
                for index, contender in enumerate(some)
                for row in range(len(ids))
            ]
            found(new)
            records += new
    return sorted(records, key=lambda record: record["row"])


class Example(Protocol):
    """What a recall task gives: token ids of the prompt, and of the answer that belongs behind it.

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
        seeds, pinned = _seeds(seed, indices), _pinned(batch[0])
        for some, kept in _hidden_states(model, ids, chosen, seeds, progress, pinned):
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


def check_length(gated: RetentionGateModel, length: int) -> None:
    """Raises ValueError if the model has no positions for rows of so many tokens."""
    most = getattr(text_config(gated.model), "max_position_embeddings", None)
    if most is not None and length > most:
        raise ValueError(
            f"Rows of {length} tokens are longer than the model's {most} positions: ask for a length of {most} or "
            "less, or take a model with a longer context."
        )


def name_of(contender: Contender | None) -> dict[str, Any]:
    """What names a contender in a record; None is the full cache."""
    if contender is None:
        return {"policy": FULL_CACHE, "memory_size": None, "budgets": None}
    name = find_policy(contender.policy).name + ("+pin" if contender.pin else "")
    return {"policy": name, "memory_size": contender.memory_size, "budgets": contender.budgets}


def _hidden_states(
    model: nn.Module,
    ids: torch.Tensor,
    chosen: Sequence[Contender],
    seeds: Sequence[int],
    progress: Progress,
    pinned: Sequence[tuple[int, int]] = (),
) -> Iterator[tuple[Sequence[Contender | None], Sequence[torch.Tensor]]]:
    """What lm_head would get, [B, T, C] each: from the full cache, None, and then from some contenders at a time."""
    gated = find_gated_model(model)  # passes go through what it lies in, which may put a sharded model together
    was_training = gated.training
    caches = [_cache_of(gated, contender, pinned) for contender in chosen]  # refused before anything is computed
    gated.eval()
    try:
        with gates_off(gated):
            full = model(input_ids=ids, use_cache=False, last_hidden_state_only=True)
        progress(len(ids))
        yield [None], [full]
        for some in _passes(chosen, max(1, _tokens_at_a_time(gated, ids.device) // ids.numel())):
            hidden = model(
                input_ids=ids.repeat(len(some), 1),
                past_key_values=SimulatedCache.side_by_side(
                    [caches.pop(0) for _ in some],  # nobody else has them: what a pass has found out goes with it
                    torch.tensor(seeds, device=ids.device),
                ),
                use_cache=True,
                last_hidden_state_only=True,
            )
            progress(len(some) * len(ids))
            yield some, hidden.split(len(ids))
    finally:
        gated.train(was_training)


def _seeds(seed: int | Sequence[int], rows: Sequence[int]) -> list[int]:
    return [seed if isinstance(seed, int) else seed[row] for row in rows]


def _passes(chosen: Sequence[Contender], at_a_time: int) -> Iterator[list[Contender]]:
    """Contenders that go through the model together: all of one policy, which share steps, and more if they fit."""
    some: list[Contender] = []
    for _, group in groupby(chosen, key=lambda contender: (contender.policy, contender.pin)):
        own = list(group)
        if some and len(some) + len(own) > at_a_time:
            yield some
            some = []
        some += own
        while len(some) > at_a_time:
            yield some[:at_a_time]
            some = some[at_a_time:]
    if some:
        yield some


def _tokens_at_a_time(gated: RetentionGateModel, device: torch.device) -> int:
    """On a GPU what a third of the free memory has room for."""
    if device.type != "cuda":
        return TOKENS_AT_A_TIME[0]
    config = text_config(gated.model)
    width = config.hidden_size
    numbers = 12 * width + 3 * getattr(config, "intermediate_size", 4 * width)  # of a token that live at once
    room = torch.cuda.mem_get_info(device)[0] // 3 // (numbers * gated.model.dtype.itemsize)
    return min(TOKENS_AT_A_TIME[1], max(TOKENS_AT_A_TIME[0], room))


def _cache_of(gated: RetentionGateModel, contender: Contender, pinned: Sequence[tuple[int, int]]) -> SimulatedCache:
    if contender.pin and not pinned:
        raise ValueError(f"{contender} pins, but what is scored has no spans to pin: leave pin=False.")
    cache = SimulatedCache(gated, contender.memory_size, policy=contender.policy, budgets=contender.budgets)
    for span in pinned if contender.pin else ():
        cache.pin(*span)
    return cache


@contextmanager
def gates_off(gated: RetentionGateModel) -> Iterator[None]:
    gated.disable_adapter_layers()
    try:
        yield
    finally:
        gated.enable_adapter_layers()


def _score_text(
    head: OutputHead, full: torch.Tensor, kept: Sequence[torch.Tensor], targets: torch.Tensor
) -> dict[str, torch.Tensor]:
    """Means over the tokens of each row: full_nll [B]; kl, nll and agreement [contenders, B].

    Args:
        full: hidden states [B, T, C]; kept: the same for each contender.
        targets: [B, T - 1], the next tokens; the last position has a forecast but no target.
    """
    batch, tokens = full.shape[:2]
    step = max(1, LOGITS_CHUNK[full.device.type == "cuda"] // batch)
    sums = {name: full.new_zeros(len(kept), batch, dtype=torch.float64) for name in ("kl", "nll", "agreement")}
    full_nll = full.new_zeros(batch, dtype=torch.float64)
    for first in range(0, tokens, step):
        here = slice(first, first + step)
        expected = targets[:, here, None]
        teacher = head.logits(full[:, here]).log_softmax(-1)  # [B, step, V]
        probabilities, most_likely = teacher.exp(), teacher.argmax(-1)
        full_nll -= teacher[:, : expected.shape[1]].gather(-1, expected).sum((1, 2))
        for index, hidden in enumerate(kept):
            student = head.logits(hidden[:, here]).log_softmax(-1)
            sums["nll"][index] -= student[:, : expected.shape[1]].gather(-1, expected).sum((1, 2))
            sums["agreement"][index] += (student.argmax(-1) == most_likely).sum(1)
            # in the student's memory: [B, step, V] is what limits a chunk
            sums["kl"][index] += torch.linalg.vecdot(probabilities, torch.sub(teacher, student, out=student)).sum(1)
    counts = {"kl": tokens, "nll": tokens - 1, "agreement": tokens}
    return {name: total / counts[name] for name, total in sums.items()} | {"full_nll": full_nll / (tokens - 1)}


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
