"""Many answers at a time are those that `generate` gives one by one, whatever the cache, the policy and the model."""

from collections import Counter

import pytest
import torch
from gated_models import gated_model, token_ids
from tape import TapeRecorder

from retention_gates.gates.adapter.model import find_gated_model
from retention_gates.gates.cache import BoundedCache
from retention_gates.gates.decode.recorder import RECORDERS
from retention_gates.gates.decode.step import DecodeStep
from retention_gates.gates.policies import POLICIES, find_policy
from retention_gates.kernels.dispatch import VARIABLE
from retention_gates.trainers.evaluation import answer_batches
from retention_gates.trainers.evaluation.answer_batches import answer_prompts

LENGTHS = (9, 1, 20, 12, 26, 3, 12)
MOST = (8, 10, 3, 9, 7, 1, 6)
EOS = [7, 19, 40, 60]
MEMORY = 16
RIVALS = [name for name, policy in POLICIES.items() if not getattr(policy, "needs_instruction", False)]


def prompts():
    return [token_ids(1, length, seed)[0].tolist() for seed, length in enumerate(LENGTHS)]


def one_by_one(model, cache_of, eos=EOS, most=MOST):
    """What `generate` gives for each prompt."""
    found = []
    for ids, new in zip(prompts(), most, strict=True):
        ids = torch.tensor([ids], device=model.device)
        options = dict(input_ids=ids, max_new_tokens=new, do_sample=False, eos_token_id=eos, pad_token_id=0)
        if cache_of is None:
            with model.disable_adapter():
                output = model.generate(**options)
        else:
            output = model.generate(past_key_values=cache_of(), **options)
        found.append(output[0, ids.shape[1] :].tolist())
    return found


def at_once(model, cache_of, batch_size=4, eos=EOS, most=MOST, **options):
    answers = answer_prompts(
        model, prompts(), cache_of=cache_of, batch_size=batch_size, max_new_tokens=most, eos=eos, **options
    )
    found = list(answers)
    assert sorted(index for index, _ in found) == list(range(len(LENGTHS))), "each prompt is answered once"
    return [ids for _, ids in sorted(found)]


def joins(cache_of):
    return cache_of().why_rows_stay is None


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request, monkeypatch):
    """Where to run; on a CPU a tape captures."""
    if request.param == "cpu":
        monkeypatch.setitem(RECORDERS, "cpu", TapeRecorder)
        monkeypatch.setenv(VARIABLE, "naive")  # as on CUDA, no choice depends on numbers
    return request.param


@pytest.fixture(params=[1, 8], ids=["looks at every step", "looks at every 8th"])
def looks(request, monkeypatch):
    monkeypatch.setitem(answer_batches.STEPS_BETWEEN_LOOKS, "cpu", request.param)


@pytest.mark.parametrize("policy", RIVALS)
def test_every_policy(policy):
    model = gated_model(num_hidden_layers=2)

    def cache_of():
        return BoundedCache(model, MEMORY, policy=policy, budgets="uniform")

    assert joins(cache_of), "rows that end are filled again"
    expected = one_by_one(model, cache_of)
    assert at_once(model, cache_of) == expected
    assert len({len(ids) for ids in expected}) > 3 and any(ids[-1] in EOS for ids in expected)


@pytest.mark.parametrize("policy", ["retention", "rkv"])
def test_any_number_at_a_time(policy, looks):
    model = gated_model(num_hidden_layers=2)

    def cache_of():
        return BoundedCache(model, MEMORY, policy=policy, budgets="uniform")

    expected = one_by_one(model, cache_of)
    assert expected != one_by_one(model, None), "a memory of 16 entries should change answers"
    for batch_size in (2, 100):
        assert at_once(model, cache_of, batch_size=batch_size) == expected


@pytest.mark.parametrize("budgets", ["adaptive", "global", "pyramid"])
def test_budgets(budgets):
    model = gated_model(num_hidden_layers=2)

    def cache_of():
        return BoundedCache(model, MEMORY, budgets=budgets)

    assert joins(cache_of) == (budgets != "global")
    assert at_once(model, cache_of) == one_by_one(model, cache_of)


@pytest.mark.parametrize(
    ("family", "policy"),
    [
        *[("qwen2", "retention"), ("qwen2", None), ("gemma3_text", "rkv"), ("gemma3_text", None)],
        *[("gpt_oss", "retention"), ("qwen3_next", "h2o"), ("qwen3_next", None)],
    ],
)
def test_families(family, policy):
    model = gated_model(family)
    cache_of = None if policy is None else lambda: BoundedCache(model, MEMORY, policy=policy, budgets="uniform")
    assert at_once(model, cache_of) == one_by_one(model, cache_of)


@pytest.mark.parametrize(
    ("family", "options"),
    [
        ("llama", {}),
        ("llama", {"policy": "rkv"}),
        ("gemma3_text", {"policy": "snapkv"}),
    ],
)
def test_steps_are_captured(family, options, device, monkeypatch):
    counts, capture, replay = Counter(), DecodeStep._capture, DecodeStep._replay
    monkeypatch.setattr(DecodeStep, "_capture", lambda self, *a: counts.update(captures=1) or capture(self, *a))
    monkeypatch.setattr(DecodeStep, "_replay", lambda self, *a: counts.update(replays=1) or replay(self, *a))
    model = gated_model(family, **({"num_hidden_layers": 2} if family == "llama" else {})).to(device)
    most = [each + 12 for each in MOST]

    def cache_of(**more):
        return BoundedCache(model, MEMORY, **options, **more)

    found = at_once(model, cache_of, eos=[], most=most)
    # steps that give new priorities and others; of a padded model, batches of 4 rows and one of another size
    kinds = 2 if getattr(find_policy(options.get("policy", "retention")), "interval", 1) > 1 else 1
    assert counts["captures"] == kinds * (1 if family == "llama" else 2) and counts["replays"] > 20
    assert found == one_by_one(model, lambda: cache_of(graph=False), eos=[], most=most)


def test_prompts_in_chunks():
    model = gated_model(num_hidden_layers=2)

    def cache_of():
        return BoundedCache(model, MEMORY)

    expected = []
    for ids, new in zip(prompts(), MOST, strict=True):
        output = model.generate(
            input_ids=torch.tensor([ids]), past_key_values=cache_of(), max_new_tokens=new, do_sample=False,
            eos_token_id=EOS, pad_token_id=0, prefill_chunk_size=8,
        )  # fmt: skip
        expected.append(output[0, len(ids) :].tolist())
    assert at_once(model, cache_of, prefill_chunk_size=8) == expected


@pytest.mark.parametrize("bounded", [True, False])
def test_drawn_answers_depend_on_their_seed_alone(bounded):
    model = gated_model(num_hidden_layers=2)
    cache_of = (lambda: BoundedCache(model, MEMORY)) if bounded else None
    options = dict(temperature=0.7, eos=[])
    found = at_once(model, cache_of, seed=5, **options)
    assert found == at_once(model, cache_of, batch_size=1, seed=5, **options)
    assert found != at_once(model, cache_of, seed=6, **options)
    (alone,) = answer_prompts(
        model, [prompts()[3]], cache_of=cache_of, batch_size=1, max_new_tokens=MOST[3], seed=[9], **options
    )
    again = at_once(model, cache_of, seed=[1, 2, 3, 9, 4, 5, 6], **options)
    assert again[3] == alone[1]


def test_drawn_tokens_have_the_models_probabilities():
    model, draws = gated_model(num_hidden_layers=1), 4000
    ids = prompts()[0]
    answers = answer_prompts(
        model, [ids] * draws, cache_of=None, batch_size=1000, max_new_tokens=1, eos=[], temperature=0.6, seed=1
    )
    drawn = torch.tensor([tokens[0] for _, tokens in answers])
    with torch.no_grad(), model.disable_adapter():
        expected = (model(input_ids=torch.tensor([ids])).logits[0, -1] / 0.6).softmax(-1)
    shares = torch.bincount(drawn, minlength=len(expected)) / draws
    error = (expected * (1 - expected) / draws).sqrt()
    assert ((shares - expected).abs() < 5 * error + 1e-9).all()


def test_the_model_is_as_before_when_the_iterator_is_closed():
    model = gated_model(num_hidden_layers=1).train()
    answers = answer_prompts(model, prompts(), cache_of=None, batch_size=2, max_new_tokens=4)
    next(answers)
    assert not model.training
    answers.close()
    assert model.training and not any(layer.disable_adapters for layer in find_gated_model(model).gated_layers)
    assert list(answer_prompts(model, [], cache_of=None, batch_size=2, max_new_tokens=4)) == []


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"batch_size": 0}, "batch_size=0 must be 1 or more"),
        ({"max_new_tokens": 0}, "max_new_tokens=0 must be 1 or more"),
        (
            {"max_new_tokens": 505},
            "Prompt 0 has 9 tokens, and its answer may have 505, but the model has 512 positions",
        ),
        ({"temperature": -1.0}, "temperature=-1.0 must be 0"),
        ({"temperature": float("nan")}, "temperature=nan must be 0"),
        ({"seed": -1}, "seed=-1 must be 0 or more"),
        ({"prompts": [[]]}, "Prompt 0 has no tokens"),
    ],
)
def test_bad_input_is_named_at_once(change, message):
    model = gated_model(num_hidden_layers=1)
    options = dict(prompts=prompts(), cache_of=None, batch_size=2, max_new_tokens=4) | change
    with pytest.raises(ValueError, match=message):
        answer_prompts(model, **options)
