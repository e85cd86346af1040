"""Scores equal those of a true token-by-token decode with a bounded cache."""

import gc
import weakref
from dataclasses import dataclass

import pytest
import torch
from gated_models import gated_model, token_ids
from tiny_models import tiny_model

from retention_gates import find_gated_model
from retention_gates.gates.cache import BoundedCache
from retention_gates.gates.simulation.stepper import Stepper
from retention_gates.trainers.evaluation import forward_passes
from retention_gates.trainers.evaluation import text as text_scores
from retention_gates.trainers.evaluation.answers import compare_answers
from retention_gates.trainers.evaluation.contenders import Contender, contenders
from retention_gates.trainers.evaluation.text import compare_rows

POLICIES = ("retention", "streaming_llm", "random", "key_norm")
ALL = [
    *contenders(POLICIES, [6, 16], ["uniform", "calibrated"]),  # calibrated budgets have a floor of 12
    *contenders(["h2o", "tova"], [6, 16], ["uniform"]),
]


@dataclass
class Answered:
    prompt_ids: list[int]
    answer_ids: list[int]


def distinct_ids(batch: int, tokens: int) -> torch.Tensor:
    """No token twice in a row: twins have keys of equal norm in layer 0, up to rounding, and either may go first."""
    generator = torch.Generator().manual_seed(0)
    return torch.stack([3 + torch.randperm(94, generator=generator)[:tokens] for _ in range(batch)])


def calibrated_model(family: str = "llama"):
    model = gated_model(family)
    gated = find_gated_model(model)
    heads = gated.active_config.num_key_value_heads
    shares = [[1.0 + 3.0 * layer + head for head in range(heads)] for layer in range(len(gated.gated_layers))]
    gated.active_config.budget_shares = shares
    return model


@torch.no_grad()
def decoded_logits(model, ids: torch.Tensor, contender: Contender | None, seed: int = 0) -> torch.Tensor:
    """Logits [1, T, V], one token at a time; of the base model's own cache without a contender."""
    if contender is None:
        with model.disable_adapter():
            return model(input_ids=ids, use_cache=False).logits.double()
    cache = BoundedCache(model, contender.memory_size, policy=contender.policy, budgets=contender.budgets, seed=seed)
    steps = [model(input_ids=ids[:, t : t + 1], past_key_values=cache).logits for t in range(ids.shape[1])]
    return torch.cat(steps, dim=1).double()


@pytest.mark.parametrize("family", ["llama", "gemma2", "gemma3_text", "granite"])
def test_equals_a_token_by_token_decode(family):
    model, rows, start = calibrated_model(family), distinct_ids(2, 48), 5
    chosen = ALL if family == "llama" else [Contender("retention", 16, "calibrated")]
    records = compare_rows(model, rows, chosen, start=start, seed=3)
    assert len(records) == 2 * (1 + len(chosen))
    for index, row in enumerate(rows):
        full = decoded_logits(model, row[None], None)[:, start:].log_softmax(-1)
        targets = row[None, start + 1 :, None]
        own = {r["policy"]: r for r in records if r["row"] == index}["full"]
        assert own["kl"] == 0 and own["agreement"] == 1
        assert own["nll"] == pytest.approx(-full[:, :-1].gather(-1, targets).mean().item(), abs=1e-5)
        # of many, half on each row: a decode takes long
        for contender in chosen[index::2] if len(chosen) > 1 else chosen:
            decoded = decoded_logits(model, row[None], contender, seed=3)[:, start:].log_softmax(-1)
            (record,) = [r for r in records if r["row"] == index and contender_of(r) == contender]
            assert record["kl"] > 1e-3, "the memory should be too small for this text"
            assert record["kl"] == pytest.approx((full.exp() * (full - decoded)).sum(-1).mean().item(), abs=1e-4)
            assert record["nll"] == pytest.approx(-decoded[:, :-1].gather(-1, targets).mean().item(), abs=1e-4)
            agree = (full.argmax(-1) == decoded.argmax(-1)).double().mean().item()
            assert record["agreement"] == pytest.approx(agree)
            assert record["full_nll"] == own["nll"]


def contender_of(record: dict) -> Contender | None:
    if record["policy"] == "full":
        return None
    return Contender(record["policy"], record["memory_size"], record["budgets"])


def test_a_memory_as_long_as_the_text_loses_nothing():
    records = compare_rows(
        gated_model(), token_ids(2, 30), contenders((*POLICIES, "h2o"), [30], ["uniform"]), batch_size=2
    )
    assert all(abs(record["kl"]) < 1e-6 and record["agreement"] == 1 for record in records)


def test_batches_and_chunks_change_nothing(monkeypatch):
    model, rows, seen = calibrated_model(), token_ids(5, 24), []
    one_by_one = compare_rows(model, rows, ALL, start=2)
    monkeypatch.setattr(text_scores, "LOGITS_CHUNK", (7, 7))
    batched = compare_rows(model, rows, ALL, start=2, batch_size=3, progress=seen.append)
    assert sum(seen) == 5 * (1 + len(ALL))
    for one, other in zip(one_by_one, batched, strict=True):
        assert one.keys() == other.keys()
        assert all(one[name] == pytest.approx(other[name], abs=1e-5) for name in one)


def test_the_model_is_left_as_it_was():
    model = gated_model().train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    compare_rows(model, token_ids(1, 20), [Contender("retention", 6)])
    assert model.training and find_gated_model(model).gated_layers[0].active_gate is not None
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_gates_come_back_after_an_error(monkeypatch):
    model = gated_model().train()
    monkeypatch.setattr(torch.nn.Embedding, "forward", lambda *a: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        compare_rows(model, token_ids(1, 20), [Contender("retention", 6)])
    assert find_gated_model(model).gated_layers[0].active_gate is not None


def test_answers_equal_a_token_by_token_decode():
    model, chosen = calibrated_model(), [ALL[0], ALL[4]]
    ids = [row.tolist() for row in distinct_ids(4, 24)]
    examples = [Answered(row[: 24 - n], row[24 - n :]) for row, n in zip(ids, [3, 3, 5, 3], strict=True)]
    examples += [Answered(ids[0][:14], ids[0][14:16])]
    # answers that the full cache or a bounded one would give, so that not all are wrong
    for example, contender in zip(examples, [None, chosen[0], None, None, chosen[1]], strict=True):
        for place in range(len(example.answer_ids)):
            so_far = torch.tensor([example.prompt_ids + example.answer_ids[:place]])
            example.answer_ids[place] = int(decoded_logits(model, so_far, contender)[0, -1].argmax())
    examples[3].answer_ids[-1] = (examples[3].answer_ids[-1] + 1) % 97
    records = compare_answers(model, "say", examples, chosen, batch_size=2)
    assert len(records) == len(examples) * (1 + len(chosen))
    for record in records:
        example = examples[record["row"]]
        ids_of = torch.tensor([example.prompt_ids + example.answer_ids])
        said = decoded_logits(model, ids_of, contender_of(record)).argmax(-1)[0, len(example.prompt_ids) - 1 : -1]
        right = [a == b for a, b in zip(said.tolist(), example.answer_ids, strict=True)]
        assert record["token_accuracy"] == sum(right) / len(right)
        assert record["exact"] == all(right)
        assert record["task"] == "say"
    full = {record["row"]: record for record in records if record["policy"] == "full"}
    assert [full[row]["exact"] for row in (0, 2, 3)] == [1, 1, 0]
    assert full[3]["token_accuracy"] == pytest.approx(2 / 3)
    assert {r["row"]: r["exact"] for r in records if contender_of(r) == chosen[0]}[1] == 1


def test_contenders():
    chosen = contenders(["retention", "random"], [8, 16], ["uniform", "calibrated"])
    assert chosen == [
        Contender("retention", 8, "uniform"),
        Contender("retention", 16, "uniform"),
        Contender("retention", 8, "calibrated"),
        Contender("retention", 16, "calibrated"),
        Contender("random", 8, "uniform"),
        Contender("random", 16, "uniform"),
    ]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((["retension"], [8], ["uniform"]), "'retention'"),
        ((["retention"], [8], ["even"]), "'even' is unknown"),
        ((["random"], [8], ["calibrated"]), "no use for budgets"),
        ((["random", "random"], [8], ["uniform"]), "name one twice"),
        ((["random"], [8, 8], ["uniform"]), "name one twice"),
        (([], [8], ["uniform"]), "Nothing to compare"),
        ((["random"], [], ["uniform"]), "Nothing to compare"),
    ],
)
def test_contenders_that_make_no_sense(arguments, message):
    with pytest.raises(ValueError, match=message):
        contenders(*arguments)


@pytest.mark.parametrize(
    ("tokens", "start", "contender", "message"),
    [
        (20, 19, Contender("retention", 8), "start=19 leaves nothing"),
        (20, -1, Contender("retention", 8), "start=-1 leaves nothing"),
        (513, 0, Contender("retention", 8), "longer than the model's 512 positions"),
        (20, 0, Contender("retention", 2), "memory_size=2 must be at least 3"),
        (20, 0, Contender("retention", 8, "calibrated"), "needs budget shares"),
    ],
)
def test_what_cannot_be_scored(tokens, start, contender, message):
    with pytest.raises(ValueError, match=message):
        compare_rows(gated_model(), token_ids(1, tokens), [contender], start=start)


def test_a_model_without_gates_and_an_empty_answer():
    with pytest.raises(ValueError, match="no retention gates"):
        compare_rows(tiny_model(), token_ids(1, 20), [Contender("random", 8)])
    with pytest.raises(ValueError, match="Example 1 has no prompt or no answer"):
        compare_answers(gated_model(), "say", [Answered([3], [4]), Answered([3], [])], [Contender("random", 8)])


def test_rows_of_one_batch_have_seeds_of_their_own():
    model, rows, chosen = gated_model(), token_ids(3, 40), [Contender("random", 8), Contender("retention", 8)]
    together = compare_rows(model, rows, chosen, batch_size=3, seed=[5, 0, 7])
    alone = [compare_rows(model, rows[i : i + 1], chosen, seed=seed) for i, seed in enumerate((5, 0, 7))]
    for one, other in zip(together, (record for records in alone for record in records), strict=True):
        assert one["policy"] == other["policy"] and one["kl"] == pytest.approx(other["kl"], abs=1e-5)
    same = compare_rows(model, rows, chosen, batch_size=3, seed=5)
    assert [r["kl"] for r in same if r["policy"] == "random"] != [r["kl"] for r in together if r["policy"] == "random"]


def test_what_is_known_is_given_pass_by_pass(monkeypatch):
    monkeypatch.setattr(forward_passes, "TOKENS_AT_A_TIME", (2 * 20 * 4, 0))  # four contenders
    chosen = contenders(["retention", "random", "h2o"], [8, 9, 10], ["uniform"])
    given = []
    records = compare_rows(gated_model(), token_ids(2, 20), chosen, batch_size=2, found=given.append)
    assert [sorted({record["policy"] for record in some}) for some in given] == [
        ["full"],
        ["retention"],
        ["random"],
        ["h2o"],
    ]
    assert sorted((r for some in given for r in some), key=lambda record: record["row"]) == records
    longer = contenders(["random"], [6, 7, 8, 9, 10, 11], ["uniform"])
    assert [len(some) for some in forward_passes._passes([*longer, *chosen], 4)] == [4, 2, 3, 3, 3]


def test_a_pass_leaves_no_memory_behind(monkeypatch):
    """What is simulated step by step has copies of queries, keys and values: a GPU has no room for those of all."""
    steppers, alive = [], []

    def made(self, *arguments):
        made_before(self, *arguments)
        steppers.append(weakref.ref(self))

    made_before = Stepper.__init__
    monkeypatch.setattr(Stepper, "__init__", made)
    monkeypatch.setattr(forward_passes, "TOKENS_AT_A_TIME", (1, 0))
    gc.disable()
    try:
        compare_rows(
            gated_model(),
            token_ids(2, 20),
            contenders(["h2o", "lagkv", "merging"], [8, 12], ["uniform"]),
            batch_size=2,
            found=lambda records: alive.append(sum(stepper() is not None for stepper in steppers)),
        )
    finally:
        gc.enable()
    assert len(steppers) == 6 and alive == [0] * 7
