"""Scores memories of bounded size against the full cache, exactly as a bounded cache would evict, without decoding.

Every score comes from one forward pass through a `SimulatedCache`, several contenders side by side: what each head
holds at every step is what a token-by-token decode with `BoundedCache` would hold. The full cache is the base model
itself, gates off.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
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
LOGITS_CHUNK = (
    256  # tokens whose logits exist at a time: 256 x 262,144 fp32 logits of the largest vocabulary are 256 MiB
)
# tokens that go through the model at a time, all contenders side by side, on a CPU and on a GPU: the more there are,
# the less a simulated step costs each; an MLP's hidden states take some 10 KB a token
TOKENS_AT_A_TIME = (2**15, 2**17)

Progress = Callable[[int], Any]  # is told how many forward passes x rows were done


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
    seed: int = 0,
    progress: Progress = lambda count: None,
) -> list[dict[str, Any]]:
    """What each contender loses to the full cache on text: one record per row and contender, the full cache included.

    A record has `kl`, the mean KL(full || contender) in nats per token; `nll` and `full_nll`, the mean negative log
    likelihood of the next token; and `agreement`, the share of tokens whose most likely successor is the same.

    Args:
        rows: token ids [R, T], one document each.
        start: the first position whose forecast counts.
        seed: of policies that draw by chance.

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
    records: list[dict[str, Any]] = []
    for first in range(0, len(rows), batch_size):
        ids = rows[first : first + batch_size].to(head.device)
        full, kept = _hidden_states(model, ids, chosen, seed, progress)
        targets = ids[:, start + 1 :]
        scores = _score_text(head, full[:, start:], [hidden[:, start:] for hidden in kept], targets)
        for row in range(len(ids)):
            full_nll = scores["full_nll"][row].item()
            records.append(
                {"task": TEXT, "row": first + row, **name_of(None), "kl": 0.0, "nll": full_nll, "full_nll": full_nll}
                | {"agreement": 1.0}
            )
            for index, contender in enumerate(chosen):
                values = {name: scores[name][index, row].item() for name in ("kl", "nll", "agreement")}
                records.append(
                    {"task": TEXT, "row": first + row, **name_of(contender), **values, "full_nll": full_nll}
                )
    return records


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
    seed: int = 0,
    progress: Progress = lambda count: None,
) -> list[dict[str, Any]]:
    """Whether each contender, and the full cache, would say the answer: one record per example and contender.

    Teacher-forced: the answer is part of the input, and each of its tokens must be the most likely one after what came
    before. A record has `token_accuracy`, the share of such tokens; `exact`, 1.0 if all are; and `said`, the ids of
    the most likely tokens. Each part of an example is scored once more, in a record of the task "TASK/PART".

    Raises:
        ValueError: for examples without prompt or answer, or longer than the model has positions for, and for
            contenders that pin where an example has nothing to pin.
    """
    gated = find_gated_model(model)
    head = OutputHead.from_model(model)
    records: list[dict[str, Any]] = []
    for indices in _batches_of_equal_length(examples, batch_size):
        batch = [examples[i] for i in indices]
        ids = torch.tensor([example.prompt_ids + example.answer_ids for example in batch], device=head.device)
        check_length(gated, ids.shape[1])
        full, kept = _hidden_states(model, ids, chosen, seed, progress, _pinned(batch[0]))
        for contender, hidden in zip([None, *chosen], [full, *kept], strict=True):
            for row, index in enumerate(indices):
                answer = slice(len(batch[row].prompt_ids), None)
                forecast = head.logits(hidden[row, answer.start - 1 : -1]).argmax(-1)
                right = forecast == ids[row, answer]
                parts = {f"{task}/{part}": right[slice(*span)] for part, span in _parts(batch[row]).items()}
                for name, tokens in {task: torch.cat([*parts.values()]) if parts else right, **parts}.items():
                    share = tokens.double().mean().item()
                    scores = {"token_accuracy": share, "exact": float(share == 1.0)}
                    said = {"said": forecast.tolist()} if name == task else {}
                    records.append({"task": name, "row": index, **name_of(contender)} | scores | said)
    return records


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
    seed: int,
    progress: Progress,
    pinned: Sequence[tuple[int, int]] = (),
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """What lm_head would get from the full cache and from each contender, [B, T, C] each."""
    gated = find_gated_model(model)  # passes go through what it lies in, which may put a sharded model together
    was_training = gated.training
    gated.eval()
    try:
        with gates_off(gated):
            full = model(input_ids=ids, use_cache=False, last_hidden_state_only=True)
        progress(len(ids))
        kept = []
        at_a_time = max(1, TOKENS_AT_A_TIME[ids.device.type == "cuda"] // ids.numel())
        for first in range(0, len(chosen), at_a_time):
            caches = [_cache_of(gated, contender, pinned, seed) for contender in chosen[first : first + at_a_time]]
            hidden = model(
                input_ids=ids.repeat(len(caches), 1),
                past_key_values=SimulatedCache.side_by_side(caches),
                use_cache=True,
                last_hidden_state_only=True,
            )
            kept += hidden.split(len(ids))
            progress(len(caches) * len(ids))
    finally:
        gated.train(was_training)
    return full, kept


def _cache_of(
    gated: RetentionGateModel, contender: Contender, pinned: Sequence[tuple[int, int]], seed: int
) -> SimulatedCache:
    if contender.pin and not pinned:
        raise ValueError(f"{contender} pins, but what is scored has no spans to pin: leave pin=False.")
    cache = SimulatedCache(gated, contender.memory_size, policy=contender.policy, budgets=contender.budgets, seed=seed)
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
    step = max(1, LOGITS_CHUNK // batch)
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
