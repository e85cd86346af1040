"""retention-gates generate: the text that model.generate gives, and true figures."""

import json
import re
from argparse import Namespace

import pytest
import torch
from tiny_adapter import Files, make_files
from transformers import DynamicCache

from retention_gates.cli import main
from retention_gates.gates.cache import BoundedCache
from retention_gates.recipes.generate import _agreement, _prompt, full_cache_bytes, prompt_ids
from retention_gates.recipes.loading.models import load_model, load_tokenizer

PROMPT = "king and queen"  # the tiny model goes on with words, not with special tokens, which are not shown


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> Files:
    return make_files(tmp_path_factory.mktemp("generate"))


def expected_text(files: Files, memory_size: int, tokens: int, **options) -> str:
    model, tokenizer = load_model(None, str(files.adapter)), load_tokenizer(str(files.model))
    ids = torch.tensor([prompt_ids(tokenizer, PROMPT, chat=False)])
    cache = BoundedCache(model, memory_size, **options)
    output = model.generate(input_ids=ids, past_key_values=cache, max_new_tokens=tokens, do_sample=False)
    return tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True)


@pytest.mark.parametrize("policy", ["retention", "streaming_llm"])
def test_the_text_is_that_of_generate(files, policy, capsys):
    arguments = ["--adapter", str(files.adapter), "--prompt", PROMPT, "--memory-size", "8", "--max-new-tokens", "30"]
    assert main(["generate", *arguments, "--policy", policy]) == 0
    printed = capsys.readouterr()
    assert printed.out.strip() == expected_text(files, 8, 30, policy=policy).strip() != ""
    (figures,) = [line for line in printed.err.splitlines() if "entries per head" in line]
    assert re.fullmatch(
        r"8 entries per head; [\d.]+ MiB held, a full cache .* after 34 tokens; [\d.]+ tokens/s", figures
    )


def test_the_prompt_may_stand_alone(files, capsys):
    arguments = ["generate", "--adapter", str(files.adapter), "--memory-size", "8", "--max-new-tokens", "30"]
    assert main([*arguments, PROMPT]) == 0
    assert capsys.readouterr().out.strip() == expected_text(files, 8, 30).strip()
    for prompts in ([], [PROMPT, "--prompt", PROMPT]):
        with pytest.raises(SystemExit) as stopped:
            main([*arguments, *prompts])
        assert stopped.value.code == 2


@pytest.mark.parametrize(
    "wish",
    [{"repetition_penalty": 5.0}, {"no_repeat_ngram_size": 2}, {"num_beams": 2}, {"do_sample": True, "top_k": 3}],
)
def test_temperature_0_is_greedy_whatever_the_model_asks_for(wish, tmp_path, capsys):
    own = make_files(tmp_path)
    arguments = ["--adapter", str(own.adapter), "--prompt", PROMPT, "--memory-size", "8", "--max-new-tokens", "30"]
    assert main(["generate", *arguments]) == 0
    greedy = capsys.readouterr().out
    (own.model / "generation_config.json").write_text(json.dumps(wish), encoding="utf-8")
    assert main(["generate", *arguments]) == 0
    assert capsys.readouterr().out == greedy


def test_chunks_sampling_and_seeds(files, capsys):
    arguments = ["--adapter", str(files.adapter), "--prompt", PROMPT, "--memory-size", "8", "--temperature", "2"]
    texts = []
    for seed in ("1", "1", "2"):
        assert (
            main(["generate", *arguments, "--prefill-chunk-size", "3", "--seed", seed, "--max-new-tokens", "40"]) == 0
        )
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1] != texts[2]


def test_without_an_adapter(files, capsys):
    arguments = ["--model", str(files.model), "--prompt", PROMPT, "--policy", "random", "--max-new-tokens", "1"]
    assert main(["generate", *arguments]) == 0
    assert "tokens/s" in capsys.readouterr().err


def test_a_full_cache_would_hold_what_a_dynamic_cache_holds(files):
    model = load_model(None, str(files.adapter))
    ids, cache, full = torch.randint(4, 20, (2, 37)), BoundedCache(model, 8), DynamicCache()
    with torch.no_grad():
        model(input_ids=ids, past_key_values=cache)
        with model.disable_adapter():
            model(input_ids=ids, past_key_values=full)
    held = sum(t.nbytes for layer in full.layers for t in (layer.keys, layer.values))
    assert full_cache_bytes(cache, 37) == held > cache.memory_bytes()


def full_cache_text(files: Files, tokens: int) -> str:
    model, tokenizer = load_model(None, str(files.adapter)), load_tokenizer(str(files.model))
    ids = torch.tensor([prompt_ids(tokenizer, PROMPT, chat=False)])
    with model.disable_adapter():
        output = model.generate(input_ids=ids, max_new_tokens=tokens, do_sample=False)
    return tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True)


def test_the_full_caches_text_stands_beside(files, capsys):
    arguments = ["--adapter", str(files.adapter), "--prompt", PROMPT, "--memory-size", "8", "--max-new-tokens", "30"]
    assert main(["generate", *arguments, "--compare-full-cache"]) == 0
    printed = capsys.readouterr()
    heading, bounded, full = re.fullmatch(r"(=== .*\n)(?s:(.*)=== full cache, gates off\n(.*))", printed.out).groups()
    assert heading == "=== 8 entries per head\n"
    texts = [expected_text(files, 8, 30).strip(), full_cache_text(files, 30).strip()]
    assert [bounded.strip(), full.strip()] == texts and texts[0] != texts[1]
    figures = [line for line in printed.err.splitlines() if "tokens/s" in line]
    assert " a full cache would hold 0.02 MiB after 34 tokens" in figures[0]
    assert figures[1].startswith("all 33 entries per head; 0.02 MiB held after 34 tokens; ")
    assert re.search(r"the first \d+ of 30 new tokens are those of the full cache", printed.err)


@pytest.mark.parametrize(
    "bounded, full, said",
    [
        ([1, 2, 3], [1, 2, 4], "the first 2 of 3 new tokens are"),
        ([3, 2], [1, 2, 4], "the first 0 of 3 new tokens are"),
        ([1, 2], [1, 2, 4], "the first 2 of 3 new tokens are"),
        ([1, 2, 4, 5], [1, 2, 4], "the first 3 of 3 new tokens are"),
        ([1, 2], [1, 2], "both continuations have the same 2 tokens"),
    ],
)
def test_how_long_two_continuations_stay_the_same(bounded, full, said):
    assert _agreement(bounded, full).startswith(said)


def test_a_memory_that_evicts_nothing_gives_the_full_caches_text(files, capsys):
    arguments = ["--adapter", str(files.adapter), "--prompt", PROMPT, "--memory-size", "99", "--max-new-tokens", "9"]
    assert main(["generate", *arguments, "--compare-full-cache", "--budgets", "uniform"]) == 0
    assert "both continuations have the same 9 tokens" in capsys.readouterr().err


@pytest.mark.parametrize("option", ["--memory", "--save-memory"])
def test_a_full_cache_has_no_memory_file(files, option, tmp_path, capsys):
    arguments = ["generate", "--adapter", str(files.adapter), "--compare-full-cache", option, str(tmp_path / "file")]
    assert main([*arguments, PROMPT]) == 2
    assert "--compare-full-cache goes without --memory" in capsys.readouterr().err


def test_a_chat_prompt_is_in_the_models_own_form(files):
    tokenizer = load_tokenizer(str(files.model))
    tokenizer.chat_template = (
        "{% for m in messages %}king {{ m['content'] }} storm {% endfor %}"
        "{% if add_generation_prompt %}queen{% endif %}"
    )
    ids = prompt_ids(tokenizer, "the sea", chat=True)
    assert tokenizer.decode(ids) == "king the sea storm queen"
    assert prompt_ids(tokenizer, "the sea", chat=False)[0] == tokenizer.convert_tokens_to_ids("<|endoftext|>")


def test_a_prompt_is_text_without_a_byte_order_mark(tmp_path):
    file = tmp_path / "prompt.txt"
    file.write_bytes("\ufeffÄhre\n".encode())
    assert _prompt(Namespace(prompt=None, text=None, prompt_file=str(file))) == "Ähre\n"
    file.write_bytes("Ähre".encode("latin-1"))
    with pytest.raises(ValueError, match="prompt.txt cannot be read as UTF-8 text"):
        _prompt(Namespace(prompt=None, text=None, prompt_file=str(file)))
    with pytest.raises(ValueError, match="The prompt holds a lone surrogate, U\\+DCC4 at character 1"):
        _prompt(Namespace(prompt="\udcc4hre", text=None, prompt_file=None))


def test_a_text_is_read_once_and_answered_later(files, tmp_path, capsys):
    text, memory = tmp_path / "book.txt", tmp_path / "book.memory"
    text.write_text(" ".join([PROMPT] * 5), encoding="utf-8")
    adapter = ["generate", "--adapter", str(files.adapter)]
    options = ["--memory-size", "8", "--policy", "streaming_llm", "--prefill-chunk-size", "9"]
    assert main([*adapter, *options, "--prompt-file", str(text), "--save-memory", str(memory)]) == 0
    read = capsys.readouterr()
    assert read.out == "" and re.search(r"book.memory holds \d+ tokens read; 8 entries per head", read.err)
    answers = []
    for _ in range(2):  # the file is not changed by being asked
        assert main([*adapter, "--memory", str(memory), "--max-new-tokens", "20", "the queen"]) == 0
        answers.append(capsys.readouterr().out)
    model, tokenizer = load_model(None, str(files.adapter)), load_tokenizer(str(files.model))
    cache = BoundedCache(model, 8, policy="streaming_llm")
    ids = torch.tensor([prompt_ids(tokenizer, text.read_text(encoding="utf-8"), chat=False)])
    question = torch.tensor([tokenizer.encode("the queen", add_special_tokens=False)])
    with torch.no_grad():
        for chunk in ids.split(9, dim=1):
            model(input_ids=chunk, past_key_values=cache)
    everything = torch.ones(1, ids.shape[1] + question.shape[1], dtype=torch.int64)
    output = model.generate(
        input_ids=question, attention_mask=everything, past_key_values=cache, max_new_tokens=20, do_sample=False
    )
    expected = tokenizer.decode(output[0, question.shape[1] :], skip_special_tokens=True)
    assert [a.strip() for a in answers] == [expected.strip()] * 2
    assert main([*adapter, "--memory", str(memory), "--memory-size", "9", "the queen"]) == 2
    assert "memory_size=8, not 9" in capsys.readouterr().err
    assert main([*adapter, "--memory", str(tmp_path / "none"), "the queen"]) == 2
    assert main([*adapter, "--prompt-file", str(tmp_path / "none")]) == 2
