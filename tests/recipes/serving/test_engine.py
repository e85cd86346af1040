"""The engine without HTTP: what chats get in company, and what becomes of those that cannot be answered."""

import operator
import queue
import time

import pytest
import torch
from gated_models import gated_model
from tape import TapeRecorder
from tiny_adapter import make_files
from waiting import wait_for

from retention_gates import BoundedCache
from retention_gates.gates.decode.recorder import RECORDERS
from retention_gates.kernels.dispatch import VARIABLE
from retention_gates.recipes.loading.models import load_model, load_tokenizer
from retention_gates.recipes.serving.chat import Chat, Ended, Refused
from retention_gates.recipes.serving.engine import Engine
from retention_gates.recipes.serving.rows import ChatRows, row_counts
from retention_gates.recipes.serving.sampling import Sampling
from retention_gates.recipes.serving.text import TextStream

MEMORY, ROWS = 8, 4
PROMPTS = ["king", "ship storm", "queen castle", "road " * 30, "the old ship sings over the sea and the storm"]


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    return make_files(tmp_path_factory.mktemp("serve"))


@pytest.fixture(scope="module")
def tokenizer(files):
    return load_tokenizer(str(files.model))


@pytest.fixture(scope="module")
def rows(files):
    return ChatRows(load_model(None, str(files.adapter)), MEMORY, rows=ROWS, chunk_size=16)


@pytest.fixture
def engine(rows, tokenizer):
    rows.reset()
    engine = Engine(rows, ROWS, tokenizer, eos={tokenizer.eos_token_id}, most_waiting=3)
    engine.start()
    yield engine
    engine.close()


class Asked(Chat):
    def __init__(self, tokenizer, prompt, timeout=60.0, **sampling):
        self.events: queue.Queue = queue.Queue()
        wish = Sampling(**({"max_tokens": 30, "temperature": 0.0} | sampling))
        ids = tokenizer.encode(prompt, add_special_tokens=False)
        super().__init__(ids, wish, self.events.put, timeout=timeout)

    def answer(self) -> tuple[str, Ended]:
        text = ""
        while not isinstance(one := self.events.get(timeout=20), Ended):
            text += one
        assert self.events.empty()
        return text, one


def ask(engine, prompt, **options):
    chat = Asked(engine.tokenizer, prompt, **options)
    engine.submit(chat)
    return chat


def slow_and_endless(engine, monkeypatch):
    """No token ends a text, and a step takes 20 ms."""
    step = engine.rows.step
    monkeypatch.setattr(engine.rows, "step", lambda *arguments: time.sleep(0.02) or step(*arguments))
    engine.eos = set()


def test_alone_and_in_company_the_text_is_that_of_generate(engine, rows, tokenizer):
    expected = []
    for prompt in PROMPTS:
        ids = torch.tensor([tokenizer.encode(prompt, add_special_tokens=False)])
        cache = BoundedCache(rows.model, MEMORY)
        output = rows.model.generate(
            input_ids=ids, past_key_values=cache, max_new_tokens=30, do_sample=False, prefill_chunk_size=16
        )[0, ids.shape[1] :]
        expected.append((tokenizer.decode(output, skip_special_tokens=True), len(output), output.tolist()))
    assert len({tuple(tokens) for _, _, tokens in expected}) == len(PROMPTS)
    steps = []
    for is_alone in (True, False):
        before, answers, chats = engine.counts.steps, [], []
        for prompt in PROMPTS:
            chats.append(ask(engine, prompt))
            if is_alone:
                answers.append(chats[-1].answer())
        answers = answers or [chat.answer() for chat in chats]
        assert [(text, ended.completion_tokens) for text, ended in answers] == [one[:2] for one in expected]
        assert [chat.text.ids for chat in chats] == [
            [token for token in tokens if token not in engine.eos] for _, _, tokens in expected
        ]
        steps.append(engine.counts.steps - before)
    assert steps[1] < 0.6 * steps[0]  # decoded together, not in turn


def test_a_seed_gives_its_text_in_any_company(engine):
    def texts(order):
        chats = {n: ask(engine, PROMPTS[n], temperature=1.5, top_p=0.9, seed=n) for n in order}
        return {n: chat.answer()[0] for n, chat in chats.items()}

    alone = {n: texts([n])[n] for n in range(3)}
    assert texts(range(3)) == texts([1, 2, 0]) == alone
    assert ask(engine, PROMPTS[1], temperature=1.5, top_p=0.9, seed=77).answer()[0] != alone[1]
    assert ask(engine, PROMPTS[1], temperature=1.0, top_p=1e-6).answer()[0] == ask(engine, PROMPTS[1]).answer()[0]


def test_stop_strings_and_lengths(engine):
    whole, ended = ask(engine, PROMPTS[1]).answer()
    words = whole.split()
    assert len(words) > 5 and ended.reason == "length" and ended.completion_tokens == 30
    stop = f"{words[3]} {words[4]}"
    text, ended = ask(engine, PROMPTS[1], stop=("no such text", stop)).answer()
    assert text == whole[: whole.index(stop)] and ended.reason == "stop" and ended.completion_tokens < 30
    text, ended = ask(engine, PROMPTS[1], max_tokens=1).answer()
    assert ended.reason == "length" and ended.completion_tokens == 1 and ended.prompt_tokens == 2


class Letters:
    """A tokenizer of one character per token."""

    @property
    def backend_tokenizer(self):
        from tokenizers import Tokenizer, decoders, models

        tokenizer = Tokenizer(models.WordLevel({chr(n): n for n in range(128)}, unk_token="?"))
        tokenizer.decoder = decoders.Fuse()
        return tokenizer


def test_a_chat_whose_text_fails_ends_alone(engine, monkeypatch, caplog):
    """Whatever goes wrong with one chat's text, its neighbours get theirs and the server stays healthy."""
    expected = [ask(engine, prompt).answer() for prompt in PROMPTS[:2]]
    slow_and_endless(engine, monkeypatch)
    add = TextStream.add

    def failing(stream, token):
        if stream.stop == ("never",) and len(stream.ids) == 5:
            raise UnicodeError("no text")
        return add(stream, token)

    monkeypatch.setattr(TextStream, "add", failing)
    for _ in range(4):  # more than make a server unhealthy
        chats = [ask(engine, PROMPTS[0]), ask(engine, PROMPTS[0], stop=("never",)), ask(engine, PROMPTS[1])]
        first, failed, last = (chat.answer() for chat in chats)
        assert failed[1].error.status == 500 and failed[1].error.message == "Text failed: UnicodeError."
        assert [text for text, _ in (first, last)] == [text for text, _ in expected]
    assert engine.is_healthy and engine.active == 0 and "could not be written" in caplog.text


@pytest.mark.parametrize(
    "text, stop, expected",
    [
        ("abcabd", ("abd",), "abc"),
        ("aaab", ("aab",), "a"),
        ("xyz", ("z", "yz"), "x"),  # the one that begins first
        ("abc", ("cd",), "abc"),  # never complete: given at the end
        ("abc", (), "abc"),
        ("abc", ("a",), ""),
    ],
)
def test_nothing_of_a_stop_string_is_given(text, stop, expected):
    stream = TextStream(Letters(), stop)
    pieces = []
    for letter in text:
        pieces.append(stream.add(ord(letter)))
        assert expected.startswith("".join(pieces))
        if stream.is_stopped:
            break
    assert "".join(pieces) + stream.end() == expected
    assert stream.is_stopped == (expected != text)


def test_a_step_that_fails_ends_its_chats_and_nothing_else(engine, monkeypatch, caplog):
    expected = ask(engine, PROMPTS[1]).answer()[0]
    step, calls = engine.rows.step, []

    def failing(*arguments):
        calls.append(arguments)
        if len(calls) == 3:
            raise RuntimeError("out of luck")
        return step(*arguments)

    monkeypatch.setattr(engine.rows, "step", failing)
    _, ended = ask(engine, PROMPTS[1]).answer()
    assert ended.reason == "error" and ended.error.status == 500 and "out of luck" in caplog.text
    assert ask(engine, PROMPTS[1]).answer()[0] == expected and engine.is_healthy
    monkeypatch.setattr(engine.rows, "read", lambda *_: 1 / 0)
    assert ask(engine, PROMPTS[1]).answer()[1].error.status == 500
    monkeypatch.undo()
    monkeypatch.setattr(engine.rows, "step", lambda tokens, _: torch.full((len(tokens), 24), float("nan")))
    assert ask(engine, PROMPTS[1]).answer()[1].error.message == "The model gave NaN."
    monkeypatch.undo()
    assert ask(engine, PROMPTS[1]).answer()[0] == expected


def test_a_prompt_that_is_being_read_when_a_step_fails_is_read_again(engine, monkeypatch):
    expected = ask(engine, PROMPTS[3]).answer()
    step, calls = engine.rows.step, []

    def failing(*arguments):
        if engine.reading is not None and not calls:  # between the two chunks of the long prompt
            calls.append(engine.reading.read)
            raise RuntimeError("out of luck")
        return step(*arguments)

    monkeypatch.setattr(engine.rows, "step", failing)
    engine.eos = set()
    first = ask(engine, PROMPTS[1], max_tokens=10_000)
    wait_for(lambda: engine.active == 1)
    second = ask(engine, PROMPTS[3])
    assert first.answer()[1].error.status == 500 and second.answer() == expected and calls == [16]


def test_a_device_that_is_lost_shows(engine, monkeypatch):
    def lost(*_):
        raise RuntimeError("device lost")

    for name in ("step", "reset"):
        monkeypatch.setattr(engine.rows, name, lost)
    for _ in range(3):
        assert engine.is_healthy
        assert ask(engine, PROMPTS[0]).answer()[1].error.status == 500
    wait_for(lambda: not engine.is_healthy)
    assert engine._thread.is_alive()


def test_those_that_find_no_place_are_refused_and_those_that_leave_make_room(engine, monkeypatch):
    slow_and_endless(engine, monkeypatch)
    chats = [ask(engine, "king", max_tokens=10_000, temperature=2.0) for _ in range(ROWS)]
    wait_for(lambda: engine.active == ROWS)
    waiting = [ask(engine, "queen") for _ in range(3)]
    with pytest.raises(Refused) as refused:
        ask(engine, "castle")
    assert refused.value.status == 429 and refused.value.retry_after >= 1
    assert all(chat.events.empty() for chat in waiting)
    for chat in (waiting[1], *chats):
        engine.cancel(chat)
    first, third = waiting[0].answer(), waiting[2].answer()
    assert first[1].reason == "length" and third == first
    assert [chat.answer()[1].reason for chat in (waiting[1], *chats)] == ["cancelled"] * (ROWS + 1)
    assert engine.active == len(engine.waiting) == 0 and engine.counts.refused == 1


def test_late_chats_end_wherever_they_are(engine, monkeypatch):
    slow_and_endless(engine, monkeypatch)
    chats = [ask(engine, "king", max_tokens=10_000, timeout=1.5) for _ in range(ROWS)]
    chats.append(ask(engine, "king", timeout=0.5))  # before there is a row for it
    for chat in chats:
        _, ended = chat.answer()
        assert ended.reason == "timeout" and ended.error.status == 504
    assert chats[0].tokens > 0 == chats[-1].tokens  # the last one was waiting


def test_closing_ends_all_chats(rows, tokenizer):
    engine = Engine(rows, ROWS, tokenizer, eos=set(), most_waiting=3)
    engine.start()
    chats = [ask(engine, "king", max_tokens=100_000) for _ in range(ROWS + 2)]
    engine.close()
    assert [chat.answer()[1].error.status for chat in chats] == [503] * len(chats)
    with pytest.raises(Refused) as refused:
        ask(engine, "king")
    assert refused.value.status == 503 and not engine.is_healthy


def test_a_counter_that_runs_out_starts_anew(engine):
    expected = ask(engine, PROMPTS[1]).answer()[0]
    engine.rows.steps = 2**24 - 100
    assert [chat.answer()[0] for chat in [ask(engine, PROMPTS[1]) for _ in range(3)]] == [expected] * 3
    assert engine.rows.steps < 100


def test_steps_are_captured_and_say_the_same(files, tokenizer, monkeypatch):
    """Chats come and go while one capture is replayed; each gets what it gets from steps that are not captured."""
    monkeypatch.setenv(VARIABLE, "naive")  # as on CUDA, no choice depends on numbers
    answers = []
    for is_captured in (False, True):
        if is_captured:
            monkeypatch.setitem(RECORDERS, "cpu", TapeRecorder)
        rows = ChatRows(load_model(None, str(files.adapter)), MEMORY, rows=ROWS, chunk_size=16)
        steps = list(rows._decode.values())
        captures = [capture for step in steps for capture in step.captures]
        assert len(captures) == 3 * is_captured  # of 4, 2 and 1 rows
        engine = Engine(rows, ROWS, tokenizer, eos={tokenizer.eos_token_id}, most_waiting=30)
        engine.start()
        asked = [ask(engine, prompt, max_tokens=3 * n + 4) for n, prompt in enumerate(2 * PROMPTS)]
        answers.append([chat.answer()[0] for chat in asked])
        after = [capture for step in steps for capture in step.captures]
        assert len(after) == len(captures) and all(map(operator.is_, captures, after))
        engine.close()
        assert not any(step.is_open for step in steps)
    assert answers[0] == answers[1] and len(set(answers[0])) > 1


def test_a_step_has_as_few_rows_as_hold_the_chats(engine, monkeypatch):
    """Chats come, end and move to lower rows; each gets what it gets alone, and steps shrink and grow."""
    alone = [ask(engine, prompt, max_tokens=60).answer() for prompt in PROMPTS[:4]]
    step, sizes = engine.rows.step, []

    def noted(tokens, positions):
        sizes.append((len(tokens), engine.active))
        return step(tokens, positions)

    monkeypatch.setattr(engine.rows, "step", noted)
    lengths = (12, 60, 30, 60)  # those of the first rows end first
    chats = [ask(engine, prompt, max_tokens=n) for prompt, n in zip(PROMPTS[:4], lengths, strict=True)]
    for chat, (text, _), n in zip(chats, alone, lengths, strict=True):
        own, ended = chat.answer()
        assert text.startswith(own) and (own == text or ended.completion_tokens == n)
    assert all(size == engine.rows.count_for(active) for size, active in sizes)
    assert {size for size, _ in sizes} == {1, 2, 4}
    again = ask(engine, PROMPTS[2], max_tokens=60).answer()
    assert again == alone[2] and sizes[-1] == (1, 1)


@pytest.mark.parametrize("rows, counts", [(1, (1,)), (2, (1, 2)), (3, (1, 2, 3)), (4, (1, 2, 4)), (5, (1, 2, 4, 5))])
def test_row_counts(rows, counts):
    assert row_counts(rows) == counts


def test_models_whose_rows_cannot_join_a_batch_are_refused():
    for family in ("gemma2", "qwen3_next"):
        with pytest.raises(ValueError, match="has layers without a gate"):
            ChatRows(gated_model(family), MEMORY, rows=2, chunk_size=16)
    with pytest.raises(ValueError, match="move between heads"):
        ChatRows(gated_model(), MEMORY, rows=2, chunk_size=16, budgets="adaptive")


@pytest.mark.parametrize("family", ["qwen3_moe", "glm4", "granite"])
def test_rows_of_other_families_go_on_as_if_alone(family):
    model, ids = gated_model(family), list(range(3, 40))
    rows = ChatRows(model, MEMORY, rows=3, chunk_size=16)
    for start in range(0, 32, 16):
        rows.read(ids[start : start + 16], start)
    rows.place(1)
    cache = BoundedCache(model, MEMORY)
    with torch.no_grad():
        for part in (ids[:16], ids[16:32], *([token] for token in ids[32:])):
            expected = model(input_ids=torch.tensor([part]), past_key_values=cache).logits[0, -1]
    for position, row in zip(range(32, 37), (1, 1, 0, 0, 0), strict=True):
        if position == 34:
            rows.move(1, 0)
        count = rows.count_for(row + 1)
        tokens, positions = [5] * count, [0] * count
        tokens[row], positions[row] = ids[position], position
        logits = rows.step(tokens, positions)[row]
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_chats_on_a_gpu_get_the_same_in_any_company(files, tokenizer, dtype):
    model = load_model(None, str(files.adapter), device="cuda").to(dtype)
    rows = ChatRows(model, MEMORY, rows=ROWS, chunk_size=16, counts=[ROWS])  # products of other shapes round otherwise
    engine = Engine(rows, ROWS, tokenizer, eos=set(), most_waiting=8)
    engine.start()
    try:
        for options in ({}, {"temperature": 1.3, "top_p": 0.9, "seed": 5}):
            alone = [ask(engine, prompt, **options).answer() for prompt in PROMPTS]
            before = torch.cuda.memory_allocated()
            chats = [ask(engine, prompt, **options) for prompt in PROMPTS]
            assert [chat.answer() for chat in chats] == alone
            assert torch.cuda.memory_allocated() <= before + 2**20
    finally:
        engine.close()
