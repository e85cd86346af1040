"""Sources read up to a budget of tokens, with bad rows counted."""

import json
from pathlib import Path

import pytest

from retention_gates.data.reading import read_tokens

GOOD = [{"text": f"the old ship {i}"} for i in range(200)]


def write(path: Path, lines: list) -> str:
    path.write_text("\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines))
    return str(path)


def test_a_budget_stops_the_reading_and_a_larger_one_only_adds(tmp_path: Path, tokenizer):
    source = write(tmp_path / "rows.jsonl", GOOD)
    few, reading = read_tokens(source, tokenizer, token_budget=100, seed=3, progress=False)
    assert 100 <= reading.tokens < 100 + len(few[-1].ids) and reading.documents == len(few) < 200
    more, _ = read_tokens(source, tokenizer, token_budget=300, seed=3, progress=False)
    assert [document.work for document in more[: len(few)]] == [document.work for document in few]
    assert [document.work for document in few] != [f"rows.jsonl:{i}" for i in range(len(few))]
    everything, reading = read_tokens(source, tokenizer, progress=False)
    assert len(everything) == 200 and reading.bad_rows == 0
    with pytest.raises(ValueError, match="token_budget=0 tokens"):
        read_tokens(source, tokenizer, token_budget=0, progress=False)


def test_bad_rows_are_an_error_or_counted(tmp_path: Path, tokenizer):
    bad = ['{"text": "cut', {"text": 7}, {"title": "no text"}, "[1]"]
    source = write(tmp_path / "rows.jsonl", GOOD[:3] + bad + GOOD[3:])
    with pytest.raises(ValueError, match="rows.jsonl' is not valid JSON at line 4.*skip_bad_rows=true counts"):
        read_tokens(source, tokenizer, progress=False)
    found, reading = read_tokens(source, tokenizer, skip_bad_rows=True, progress=False)
    assert len(found) == 200 and reading.bad_rows == 4 and len(reading.examples) == 3
    assert "200 documents" in str(reading) and "4 bad rows skipped, the first: " in str(reading)
    with pytest.raises(ValueError, match="no document with any text .*3 bad rows skipped"):
        read_tokens(write(tmp_path / "bad.jsonl", [{"text": 1}] * 3), tokenizer, skip_bad_rows=True, progress=False)


def test_chats_that_the_template_refuses_are_bad_rows(tmp_path: Path, tokenizer):
    chat = [{"role": "user", "content": "the ship"}, {"role": "assistant", "content": "the sea"}]
    rows = [{"messages": chat}, {"messages": chat[:1]}, {"messages": "none"}, {"messages": chat}]
    source = write(tmp_path / "rows.jsonl", rows)
    found, reading = read_tokens(source, tokenizer, chat_field="messages", skip_bad_rows=True, progress=False)
    assert len(found) == 2 and reading.bad_rows == 2 and "has no assistant turn" in "".join(reading.examples)
