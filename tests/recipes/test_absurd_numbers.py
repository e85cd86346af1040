"""Numbers that no machine has room for: every command says what it would take and what is there, with exit code 2."""

import re
import time

import pytest
from tiny_adapter import Files, make_files

from retention_gates.cli import main
from retention_gates.gates.adapter import placement
from retention_gates.gates.cache.bounded_cache import BoundedCache
from retention_gates.recipes.loading.models import load_model
from retention_gates.recipes.serving.rows import ChatRows
from retention_gates.trainers.evaluation.answer_batches import answer_prompts
from retention_gates.trainers.evaluation.contenders import Contender
from retention_gates.trainers.evaluation.written import compare_generations

ROOM = r"{} takes [\d,]+ GiB .*, and cpu has [\d,]+ GiB: choose at most [\d,]+\."
SCORED = ["--policies", "random", "--budgets", "uniform", "--output", "OUT"]
CASES = [
    (["generate", "--prompt", "a ship", "--max-new-tokens", str(10**12)], "max_new_tokens=10{12} .* at most 16,777,"),
    (["generate", "--prompt", "a ship", "--memory-size", str(10**12)], ROOM.format("memory_size=10{12}")),
    (["generate", "--prompt", "a ship", "--seed", str(10**30)], "seed=10{30} must be .* at most 4294967295"),
    (["serve", "--max-chats", str(10**9)], ROOM.format("max_chats=10{9}")),
    (["serve", "--max-chats", str(10**15)], ROOM.format("max_chats=10{15}")),
    (["serve", "--cache-gib", "1e9"], ROOM.format("--cache-gib=10{9}")),
    (["serve", "--cache-gib", "1e300"], ROOM.format(r"--cache-gib=\d+")),
    (["serve", "--memory-size", str(10**12)], ROOM.format("memory_size=10{12}")),
    (["evaluate", "TEXT", "--documents", str(10**9), *SCORED], "count=10{9} windows"),
    (["evaluate", "TEXT", "--length", str(10**9), *SCORED], "count=8 windows of 10{9} tokens"),
    (["evaluate", "TEXT", "--seed", str(10**30), *SCORED], "run.seeds=10{30} must be .* to 4294967295"),
    (
        ["evaluate", "TEXT", "--tasks", "passkey", "--length", "200", "--examples", str(10**12), *SCORED],
        ROOM.format("tasks.passkey.examples=10{12}"),
    ),
    (["inspect", "TEXT", "--rows", str(10**9), "--output", "OUT"], "count=10{9} windows"),
    (
        ["inspect", "TEXT", "--length", "40", "--memory-size", str(10**12), "--output", "OUT"],
        "of 10{12} entries .* smaller",
    ),
    (["inspect", "TEXT", "--seed", str(10**30), "--output", "OUT"], "--seed 10{30} must be from 0 to 4294967295"),
    (["calibrate", "TEXT", "--rows", str(10**9), "--output", "OUT"], "count=10{9} windows"),
    (["calibrate", "TEXT", "--length", str(10**9), "--output", "OUT"], "of 10{9} tokens"),
    (["calibrate", "TEXT", "--seed", str(10**30), "--output", "OUT"], "--seed 10{30} must be from 0 to 4294967295"),
]


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> Files:
    return make_files(tmp_path_factory.mktemp("absurd"))


@pytest.mark.parametrize(("arguments", "message"), CASES, ids=[" ".join(given[:5]) for given, _ in CASES])
def test_a_number_that_no_machine_has_room_for(files, tmp_path, capsys, arguments, message):
    out = tmp_path / "out"
    given = [str(out) if argument == "OUT" else argument for argument in arguments if argument != "TEXT"]
    texts = ["--text", str(files.texts)] if "TEXT" in arguments else []
    port = ["--port", "0"] if given[0] == "serve" else []
    began = time.monotonic()
    assert main([*given, "--adapter", str(files.adapter), *texts, *port]) == 2
    assert time.monotonic() - began < 20
    last = capsys.readouterr().err.strip().splitlines()[-1]
    pattern = re.sub(r"10\{(\d+)\}", lambda power: str(10 ** int(power[1])), message)
    assert re.search(pattern, last), last
    assert not out.exists()


def test_a_batch_larger_than_the_rows_is_no_matter(files, tmp_path):
    given = ["--length", "60", "--memory-size", "8", "--documents", "2", "--batch-size", str(10**8)]
    arguments = ["--policies", "random", "--budgets", "uniform", "--output", str(tmp_path / "out")]
    assert main(["evaluate", *files.arguments, *given, *arguments]) == 0


@pytest.fixture
def model(files):
    return load_model(None, str(files.adapter), device="cpu")


def test_as_many_chats_as_there_is_room_for(model, monkeypatch):
    rows = ChatRows(model, 16, rows=3, chunk_size=8)
    held = rows.memory_bytes() + 3 * 4 * model.config.vocab_size
    monkeypatch.setattr(placement, "device_bytes", lambda device: held)
    ChatRows(model, 16, rows=3, chunk_size=8)
    with pytest.raises(ValueError, match=r"max_chats=1000 takes .* choose at most [3-4]\."):
        ChatRows(model, 16, rows=1000, chunk_size=8)


def test_as_many_answers_at_a_time_as_there_is_room_for(model, monkeypatch):
    def answer(rows: int) -> list:
        prompts = [[1, 2, 3]] * 40
        make = lambda: BoundedCache(model, 16, policy="streaming_llm")  # noqa: E731
        return list(answer_prompts(model, prompts, cache_of=make, batch_size=rows, max_new_tokens=2))

    assert len(answer(10**8)) == 40, "no more rows than prompts"
    monkeypatch.setattr(placement, "device_bytes", lambda device: 100_000)
    with pytest.raises(ValueError, match=r"batch_size=40 takes .* choose at most (\d)+\."):
        answer(10**8)


def test_rows_of_text_that_no_machine_has_room_for(files, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(placement, "device_bytes", lambda device: 200_000)
    given = ["--length", "60", "--memory-size", "8", "--documents", "30", *SCORED[:-1], str(tmp_path / "out")]
    assert main(["evaluate", *files.arguments, *given, "--batch-size", "1000"]) == 2
    assert re.search(r"batch_size=30 takes .* hidden states .* choose at most \d+\.", capsys.readouterr().err)


def test_samples_that_no_machine_has_room_for(model):
    class Asked:
        task, prompt_ids, max_new_tokens = "asked", [1, 2, 3], 2

        def score(self, answer: str) -> float:
            return 0.0

    with pytest.raises(ValueError, match=rf"samples={10**12} takes .* GiB for a record of each answer to 2 questions"):
        compare_generations(
            model, None, [Asked()], [Contender("random", 8, "uniform")], samples=10**12, temperature=1.0
        )
