"""Answers are those of model.generate with the cache in question, and records aggregate like any other."""

from dataclasses import dataclass, field

import pytest
import torch
from gated_models import gated_model, token_ids
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from retention_gates.gates.cache import BoundedCache
from retention_gates.trainers.evaluation.contenders import Contender
from retention_gates.trainers.evaluation.paired_statistics import aggregate, mean_over_samples
from retention_gates.trainers.evaluation.written import compare_generations, loops

CHOSEN = [Contender("retention", 6), Contender("streaming_llm", 6), Contender("streaming_llm", 64)]


@dataclass
class Asked:
    prompt_ids: list[int]
    task: str = "suite/kind"
    max_new_tokens: int = 8
    asked: list[str] = field(default_factory=list)

    def score(self, answer: str) -> float:
        self.asked.append(answer)
        return len(set(answer.split())) / 8


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    words = {"<unk>": 0, "<pad>": 1, "</s>": 2} | {f"w{i}": i for i in range(3, 97)}
    word_level = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    return PreTrainedTokenizerFast(tokenizer_object=word_level, eos_token="</s>", pad_token="<pad>")


def questions(**options) -> list[Asked]:
    return [Asked(row[: 20 - i], **options) for i, row in enumerate(token_ids(3, 20).tolist())]


def test_answers_are_those_of_generate_with_each_cache(tokenizer):
    model, asked = gated_model().train(), questions()
    seen = []
    records = compare_generations(
        model, tokenizer, asked, CHOSEN, batch_size=2, found=lambda ask, record: seen.append(record)
    )
    assert model.training and len(seen) == len(records) == 3 * 4
    assert all(record["is_cut"] for record in records), "no token ends a text of this model"
    model.eval()
    for row, question in enumerate(asked):
        ids = torch.tensor([question.prompt_ids])
        with torch.no_grad(), model.disable_adapter():
            expected = {"full": model.generate(input_ids=ids, max_new_tokens=8, do_sample=False)}
        for policy in ("retention", "streaming_llm"):
            cache = BoundedCache(model, 6, policy=policy, budgets="uniform")
            with torch.no_grad():
                expected[policy] = model.generate(
                    input_ids=ids, past_key_values=cache, max_new_tokens=8, do_sample=False
                )
        found = {(r["policy"], r["memory_size"]): r for r in records if r["row"] == row}
        for policy, output in expected.items():
            record = found[policy, None if policy == "full" else 6]
            assert record["answer"] == tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True)
            assert record["new_tokens"] == output.shape[1] - ids.shape[1] and record["task"] == "suite/kind"
            assert record["score"] == len(set(record["answer"].split())) / 8
        assert found["streaming_llm", 64]["answer"] == found["full", None]["answer"], "nothing was evicted"
    assert len({record["answer"] for record in records}) > 3, "memories of 6 entries should change answers"


def test_records_aggregate_by_task(tokenizer):
    asked = questions()
    asked[2].task = "suite/other"
    records = compare_generations(gated_model(), tokenizer, asked, CHOSEN[:2], max_new_tokens=2)
    summaries = aggregate(records, reference="streaming_llm")
    assert {(s.task, s.policy, s.rows) for s in summaries} == {
        (task, policy, rows)
        for task, rows in (("suite/kind", 2), ("suite/other", 1))
        for policy in ("full", "retention", "streaming_llm")
    }
    (ours,) = [s for s in summaries if (s.task, s.policy) == ("suite/kind", "retention")]
    scores = [r["score"] for r in records if (r["task"], r["policy"]) == ("suite/kind", "retention")]
    assert ours.scores["score"].mean == pytest.approx(sum(scores) / 2) and ours.scores["score"].pairing is not None
    assert all(record["new_tokens"] == 2 for record in records)


def test_a_prompt_read_in_chunks_may_answer_otherwise_and_a_large_memory_does_not(tokenizer):
    model = gated_model()
    large = [Contender("retention", 64)]
    whole = compare_generations(model, tokenizer, questions(), large)
    chunked = compare_generations(model, tokenizer, questions(), large, prefill_chunk_size=5)
    assert [r["answer"] for r in whole] == [r["answer"] for r in chunked]


def test_samples_are_drawn_alike_for_all_contenders_and_a_stopped_run_goes_on(tokenizer):
    model, options = gated_model(), dict(samples=3, temperature=0.8, batch_size=4, seed=7)
    chosen = [Contender("retention", 6), Contender("streaming_llm", 64)]
    kept = {}

    def stops(ask, record):
        if len(kept) == 11:
            raise KeyboardInterrupt
        kept[ask] = record

    whole = compare_generations(model, tokenizer, questions(), chosen, **options)
    assert [r["sample"] for r in whole] == [0, 1, 2] * 9
    with pytest.raises(KeyboardInterrupt):
        compare_generations(model, tokenizer, questions(), chosen, found=stops, **options)
    efforts, new = [], []
    resumed = compare_generations(
        model, tokenizer, questions(), chosen, known=lambda ask: kept.get(ask) and kept[ask] | {"score": None},
        found=lambda ask, record: new.append(ask), spent=efforts.append, **options,
    )  # fmt: skip
    assert resumed == whole and len(new) == 27 - 11 == sum(effort.answers for effort in efforts)
    assert [effort.contender for effort in efforts] == [None, *chosen] and efforts[0].tokens == 0
    assert efforts[2].tokens == sum(r["new_tokens"] for r in whole if r["policy"] == "streaming_llm")

    by_policy = {name: [r["answer"] for r in whole if r["policy"] == name] for name in ("full", "streaming_llm")}
    assert by_policy["full"] == by_policy["streaming_llm"], "nothing was evicted, and chance is the same"
    assert len(set(by_policy["full"])) == 9
    means = mean_over_samples(whole)
    assert len(means) == 9 and means[0]["score"] == pytest.approx(sum(r["score"] for r in whole[:3]) / 3)
    (full,) = [s for s in aggregate(means) if s.policy == "full"]
    assert full.rows == 3 and full.scores["score"].mean == pytest.approx(
        sum(r["score"] for r in whole if r["policy"] == "full") / 9
    )


def test_greedy_answers_do_not_depend_on_the_seed(tokenizer):
    one, other = (
        [r["answer"] for r in compare_generations(gated_model(), tokenizer, questions(), CHOSEN, seed=seed)]
        for seed in (0, 1)
    )
    assert one == other


@pytest.mark.parametrize(
    ("ids", "expected"),
    [
        ([5] * 32, True),
        ([5] * 31, False),
        ([1, 2, 3] + [4, 5, 6, 7, 8, 9, 10, 11] * 4, True),
        ([4, 5, 6, 7, 8, 9, 10, 11] * 4 + [1], False),
        (list(range(20)) * 4, True),
        (list(range(20)) * 3, False),
        ([9] + list(range(20)) * 4, True),
        (list(range(100)), False),
        ([], False),
    ],
)
def test_loops(ids, expected):
    assert loops(ids) == expected


@given(
    start=st.lists(st.integers(0, 9), max_size=20),
    period=st.lists(st.integers(0, 9), min_size=1, max_size=9),
    times=st.integers(1, 40),
)
def test_loops_are_what_plain_words_say(start, period, times):
    ids = start + period * times
    if times >= 4 and len(period) * times >= 32 + len(period):
        assert loops(ids)
    if loops(ids):
        assert any(ids[-p * n :] == ids[-p:] * n for p in range(1, len(ids)) for n in [max(4, -(-32 // p))])


@pytest.mark.parametrize(
    ("asked", "options", "message"),
    [
        ([], {}, "no question to answer"),
        ([Asked([])], {}, "Question 0 of suite/kind has no prompt"),
        (
            [Asked([5] * 500, max_new_tokens=20)],
            {},
            r"a prompt of 500 tokens and an answer of 20, but the model has 512 positions: shorten prompts",
        ),
        ([Asked([5] * 5)], {"max_new_tokens": 0}, "max_new_tokens=0 must be 1 or more"),
        ([Asked([5] * 5)], {"samples": 2}, "samples=2 of the likeliest tokens would all be alike: give a temperature"),
        ([Asked([5] * 5)], {"samples": 0}, "samples=0 must be 1 or more"),
        ([Asked([5] * 5)], {"temperature": float("inf")}, "temperature=inf must be 0"),
        ([Asked([5] * 5)], {"batch_size": 0}, "batch_size=0 must be 1 or more"),
        ([Asked([5] * 5)], {"chosen": [Contender("retention", 6, pin=True)]}, "no spans to pin"),
    ],
)
def test_bad_input_is_named(tokenizer, asked, options, message):
    with pytest.raises(ValueError, match=message):
        compare_generations(gated_model(), tokenizer, asked, **{"chosen": CHOSEN, **options})
