"""lm-eval's tasks see what a token-by-token decode with a bounded cache sees; a local task, no network."""

import json
import re
from pathlib import Path

import pytest
import torch
import yaml
from gated_models import gated_model
from tiny_adapter import make_files
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from retention_gates.cli import main
from retention_gates.gates.cache import BoundedCache
from retention_gates.trainers.evaluation.contenders import Contender
from retention_gates.trainers.evaluation.paired_statistics import aggregate

# lm-eval is large: it is tested where it is installed, which it must be if the pins name it.
PINS = (Path(__file__).parents[3] / "constraints.txt").read_text(encoding="utf-8")
if re.search(r"^lm[-_]eval==", PINS, flags=re.MULTILINE):
    import lm_eval  # noqa: F401
else:
    pytest.importorskip("lm_eval")

from retention_gates.recipes.comparison.lm_eval_model import BoundedCacheLM, run_lm_eval  # noqa: E402

CHOSEN = [Contender("retention", 6), Contender("streaming_llm", 6)]
TEXTS = [" ".join(f"w{3 + (7 * i + 5 * j) % 90}" for j in range(10 + i)) for i in range(3)]


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    words = {"<unk>": 0, "<pad>": 1, "</s>": 2} | {f"w{i}": i for i in range(3, 97)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>", pad_token="<pad>")


@pytest.fixture(scope="module")
def tasks(tmp_path_factory) -> Path:
    """A folder with a multiple-choice task and a generative one."""
    folder = tmp_path_factory.mktemp("tasks")
    rows = [{"text": text, "choices": ["w5 w9", "w7 w11 w13", "w40"], "gold": i % 3} for i, text in enumerate(TEXTS)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    common = {
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(folder / "rows.jsonl")}},
        "test_split": "test",
        "doc_to_text": "{{text}}",
    }
    choice = common | {
        "task": "local_choice",
        "output_type": "multiple_choice",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "gold",
        "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
    }
    written = common | {
        "task": "local_written",
        "output_type": "generate_until",
        "doc_to_target": "w5",
        "generation_kwargs": {"until": ["w96"], "do_sample": False, "max_gen_toks": 6},
        "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
    }
    for task in (choice, written):
        (folder / f"{task['task']}.yaml").write_text(yaml.safe_dump(task), encoding="utf-8")
    return folder


@torch.no_grad()
def decoded_likelihood(model, tokenizer, contender: Contender | None, text: str, choice: str) -> float:
    """The log likelihood of a choice, one token at a time."""
    ids = torch.tensor([tokenizer.encode(f"{text} {choice}", add_special_tokens=False)])
    count = len(choice.split())
    if contender is None:
        with model.disable_adapter():
            logits = model(input_ids=ids, use_cache=False).logits
    else:
        cache = BoundedCache(model, contender.memory_size, policy=contender.policy, budgets="uniform")
        steps = [model(input_ids=ids[:, t : t + 1], past_key_values=cache).logits for t in range(ids.shape[1])]
        logits = torch.cat(steps, 1)
    scores = logits.log_softmax(-1)[0, -count - 1 : -1]
    return scores.gather(1, ids[0, -count:, None]).sum().item()


@pytest.mark.parametrize("contender", [None, *CHOSEN], ids=["full", "retention", "streaming_llm"])
def test_likelihoods_equal_a_token_by_token_decode(tokenizer, contender):
    model = gated_model()
    lm = BoundedCacheLM(model, tokenizer, contender, batch_size=4)
    pairs = [(text, choice) for text in TEXTS for choice in ("w5 w9", "w7 w11 w13", "w40")]
    requests = [((text, choice), tokenizer.encode(text), tokenizer.encode(choice)) for text, choice in pairs]
    found = lm._loglikelihood_tokens(requests, disable_tqdm=True)
    for (text, choice), (likelihood, _) in zip(pairs, found, strict=True):
        assert likelihood == pytest.approx(decoded_likelihood(model, tokenizer, contender, text, choice), abs=1e-3)


def test_records_have_a_row_of_each_document_and_contender(tokenizer, tasks):
    model = gated_model()
    records = run_lm_eval(
        model, tokenizer, ["local_choice", "local_written"], CHOSEN, include_path=tasks, batch_size=3
    )
    assert len(records) == 2 * 3 * 3
    for record in records:
        text = TEXTS[record["row"]]
        contender = next((c for c in CHOSEN if c.policy == record["policy"]), None)
        if record["task"] == "local_choice/acc":
            likelihoods = [
                decoded_likelihood(model, tokenizer, contender, text, choice)
                for choice in ("w5 w9", "w7 w11 w13", "w40")
            ]
            assert record["score"] == float(likelihoods.index(max(likelihoods)) == record["row"] % 3)
        else:
            assert record["task"] == "local_written/exact_match"
            assert record["answer"].split() == generated(model, tokenizer, contender, text)
    written = {(r["row"], r["answer"]) for r in records if r["answer"] is not None}
    assert len(written) > 3, "memories of 6 entries should change some answers"
    summaries = aggregate(records, reference="streaming_llm")
    assert {(s.task, s.rows) for s in summaries} == {("local_choice/acc", 3), ("local_written/exact_match", 3)}


@torch.no_grad()
def generated(model, tokenizer, contender: Contender | None, text: str) -> list[str]:
    ids = torch.tensor([tokenizer.encode(text)])
    options = {"input_ids": ids, "max_new_tokens": 6, "do_sample": False}
    if contender is None:
        with model.disable_adapter():
            output = model.generate(**options)
    else:
        cache = BoundedCache(model, contender.memory_size, policy=contender.policy, budgets="uniform")
        output = model.generate(past_key_values=cache, **options)
    return tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True).split()


def test_what_does_not_fit_is_refused(tokenizer, tasks):
    model = gated_model(max_position_embeddings=12)
    for task, options, message in [
        ("local_written", {}, "A prompt has 12 tokens and the model has room for 6 of its 12 positions"),
        ("local_choice", {}, "A prompt has 13 tokens and the model has room for 12 of its 12 positions"),
        ("local_written", {"max_new_tokens": 20}, "Answers of up to 20 tokens leave no room for a prompt"),
        ("local_written", {"chat": True}, "has no chat template"),
    ]:
        with pytest.raises(ValueError, match=message):
            run_lm_eval(model, tokenizer, [task], CHOSEN, include_path=tasks, batch_size=3, **options)
    with pytest.raises(ValueError, match="Name at least one task"):
        run_lm_eval(model, tokenizer, [], CHOSEN)
    with pytest.raises(ValueError, match="no spans to pin"):
        BoundedCacheLM(model, tokenizer, Contender("retention", 6, pin=True))


@pytest.mark.slow  # lm-eval looks through thousands of files for its own tasks
def test_an_unknown_task_is_named(tokenizer, tasks):
    with pytest.raises(ValueError, match="lm-eval has no task 'local_choices'"):
        run_lm_eval(gated_model(), tokenizer, ["local_choices"], CHOSEN, include_path=tasks)


def test_the_command_writes_records_and_a_table(tasks, tmp_path):
    files = make_files(tmp_path)
    arguments = ["evaluate", *files.arguments, "--lm-eval", "local_choice,local_written", "--include-path", str(tasks)]
    arguments += ["--memory-size", "8", "--policies", "retention", "streaming_llm", "--limit", "2"]
    assert main([*arguments, "--output", str(tmp_path / "out")]) == 0
    header, *records = map(json.loads, (tmp_path / "out" / "results.jsonl").read_text().splitlines())
    assert header["lm_eval"] == "local_choice,local_written" and len(records) == 2 * 2 * 3
    report = (tmp_path / "out" / "report.md").read_text()
    assert "| local_choice/acc | all | full |" in report and "| local_written/exact_match | 8 | retention |" in report
