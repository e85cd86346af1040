"""Parts of an answer with scores of their own, and spans that a contender pins."""

from dataclasses import dataclass, field

import pytest
import torch
from gated_models import gated_model, token_ids

from retention_gates.gates.cache import BoundedCache
from retention_gates.trainers.evaluation.answers import compare_answers, with_pinned
from retention_gates.trainers.evaluation.contenders import Contender
from retention_gates.trainers.evaluation.text import compare_rows

CHOSEN = [Contender("retention", 12), Contender("streaming_llm", 12)]


@dataclass
class Answered:
    prompt_ids: list[int]
    answer_ids: list[int]
    parts: dict[str, tuple[int, int]] = field(default_factory=dict)
    pinned: tuple[tuple[int, int], ...] = ()


def examples(**options) -> list[Answered]:
    return [Answered(row[:20], row[20:], **options) for row in token_ids(3, 30).tolist()]


def test_parts_are_scored_apart_and_what_lies_between_is_not():
    model = gated_model()
    made = examples()
    with torch.no_grad(), model.disable_adapter():
        for example in made:  # the full cache says tokens 0..3 of the answer, and not all of those from 6 on
            for place in range(4):
                so_far = torch.tensor([example.prompt_ids + example.answer_ids[:place]])
                example.answer_ids[place] = model(input_ids=so_far).logits[0, -1].argmax().item()
    whole = {r["row"]: r for r in compare_answers(model, "turns", made, []) if r["policy"] == "full"}
    for example in made:
        example.parts = {"one": (0, 4), "two": (6, 10)}
    records = compare_answers(model, "turns", made, CHOSEN, batch_size=2)
    assert len(records) == 3 * 3 * 3 and {r["task"] for r in records} == {"turns", "turns/one", "turns/two"}
    for row in range(3):
        full = {r["task"]: r for r in records if r["row"] == row and r["policy"] == "full"}
        assert full["turns/one"]["exact"] == 1.0 == full["turns/one"]["token_accuracy"]
        assert full["turns/two"]["exact"] == 0.0
        mean = (1.0 + full["turns/two"]["token_accuracy"]) / 2
        assert full["turns"]["token_accuracy"] == pytest.approx(mean) and full["turns"]["exact"] == 0.0
        assert whole[row]["token_accuracy"] >= 0.4


def test_pinned_spans_are_kept_as_a_bounded_cache_keeps_them():
    model = gated_model()
    made = examples(pinned=((2, 8),))
    chosen = with_pinned(CHOSEN, made)
    assert [c.pin for c in chosen] == [False, False, True, True]
    records = compare_answers(model, "task", made, chosen)
    names = {r["policy"] for r in records}
    assert names == {"full", "retention", "streaming_llm", "retention+pin", "streaming_llm+pin"}
    for row, example in enumerate(made):
        ids = torch.tensor([example.prompt_ids + example.answer_ids])
        cache = BoundedCache(model, 12, budgets="uniform")
        cache.pin(2, 8)
        with torch.no_grad():
            steps = [model(input_ids=ids[:, t : t + 1], past_key_values=cache).logits for t in range(30)]
        right = torch.cat(steps, 1)[0, 19:-1].argmax(-1) == ids[0, 20:]
        (record,) = [r for r in records if r["row"] == row and r["policy"] == "retention+pin"]
        assert record["token_accuracy"] == pytest.approx(right.double().mean().item())


def test_examples_that_pin_other_spans_are_not_batched_together():
    model = gated_model()
    made = examples()
    for example, span in zip(made, [((2, 8),), ((3, 9),), ((2, 8),)], strict=True):
        example.pinned = span
    chosen = with_pinned(CHOSEN, made)
    batched, single = (
        {
            (r["row"], r["policy"]): r["token_accuracy"]
            for r in compare_answers(model, "task", made, chosen, batch_size=n)
        }
        for n in (3, 1)
    )
    assert batched == single and len(single) == 3 * 5


def test_what_cannot_be_pinned_is_refused():
    model, chosen = gated_model(), [Contender("retention", 12, pin=True)]
    assert with_pinned(CHOSEN, examples()) == CHOSEN
    with pytest.raises(ValueError, match="no spans to pin"):
        compare_answers(model, "task", examples(), chosen)
    with pytest.raises(ValueError, match="no spans to pin"):
        compare_rows(model, token_ids(1, 20), chosen)
    with pytest.raises(ValueError, match="memory_size=12 must be at least 19"):
        compare_answers(model, "task", examples(pinned=((2, 18),)), chosen)
    with pytest.raises(ValueError, match="Rows of 600 tokens .* 512 positions: ask for a length of 512 or less"):
        compare_answers(model, "task", [Answered([5] * 590, [5] * 10)], CHOSEN)
    with pytest.raises(ValueError, match="Example 0 has no prompt or no answer"):
        compare_answers(model, "task", [Answered([5] * 5, [])], CHOSEN)
