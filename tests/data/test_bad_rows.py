"""Rows that cannot be read: an error that says where and why, or counted and left out, whoever reads them."""

import json
import time
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from chats import with_template
from hypothesis import given
from hypothesis import strategies as st

from retention_gates.data.files import BadRow
from retention_gates.data.reading import read_tokens
from retention_gates.data.sources import Document, load_documents, split_by_work, stream_documents
from retention_gates.data.suites import SUITES
from retention_gates.data.tokens import tokenize_batch

datasets = pytest.importorskip("datasets", reason="GPU tests also run where it is not installed")

MARK = b"\xef\xbb\xbf"
DEEP = b'{"text": ' + b"[" * 100_000 + b"]" * 100_000 + b"}"
# what a line holds, and what is said of it
BAD_LINES = {
    b'{"text": "half of a character: \\ud83d"}': "line 2 of .*lone surrogate, U\\+D83D at character 22",
    b'{"text": "caf\xe9"}': "not UTF-8 text at line 2 .*0xe9",
    b'{"text": "an encoded surrogate \xed\xa0\xbd"}': "not UTF-8 text at line 2",
    DEEP: "not valid JSON at line 2: it is nested too deep",
    b'{"text": %s}' % (b"1" * 5000): "cannot be read at line 2: Exceeds the limit",
    b'{"text": "cut': "not valid JSON at line 2",
    b'{"text": 7}': "line 2 of .* holds a int",
    b'{"text": [[[]]]}': "line 2 of .* is not a chat",
    b'{"text": %s}' % (b"[" * 400 + b"1" + b"]" * 400): "line 2 of .* is not a chat",
    b'["text"]': "line 2 of .* is a list",
    b'{"title": "no text"}': "no column 'text' in line 2 of",
}


def skipping(source: str, **options) -> tuple[list[Document], list[str]]:
    """The documents of a source, and what was wrong with the other rows."""
    problems: list[str] = []
    return list(stream_documents(source, on_bad_row=problems.append, **options)), problems


def texts(documents: list[Document]) -> list[str | None]:
    return [document.text for document in documents]


@pytest.mark.parametrize(("line", "message"), BAD_LINES.items())
def test_a_bad_line_is_named_or_skipped(tmp_path: Path, line: bytes, message: str):
    path = tmp_path / "r.jsonl"
    path.write_bytes(b'{"text": "one"}\n' + line + b'\n{"text": "three"}\n')
    with pytest.raises(BadRow, match=message):
        load_documents(str(path))
    found, problems = skipping(str(path))
    assert texts(found) == ["one", "three"] and len(problems) == 1
    path.write_bytes(line + b'\n{"text": "two"}\n{"text": "three"}\n')  # the first row tells nothing of the others
    found, problems = skipping(str(path))
    assert texts(found) == ["two", "three"] and len(problems) == 1
    assert texts(skipping(str(path), seed=3)[0]) in (["two", "three"], ["three", "two"])


@pytest.mark.parametrize(
    "line",
    [*(line for line in BAD_LINES if not line.endswith(b"cut")), b"{oops: 1}", b"", b"7"],
    ids=lambda line: str(line[:30]),
)
def test_a_bad_entry_of_a_list_costs_that_entry_alone(tmp_path: Path, line: bytes):
    path = tmp_path / "r.json"
    path.write_bytes(b' \n[{"text": "one, [\\"}"},\n' + line + b',\n{"text": "three"}]\n')
    with pytest.raises(BadRow, match="entry 2(, line 3)?"):
        load_documents(str(path))
    found, problems = skipping(str(path))
    assert texts(found) == ['one, ["}', "three"] and len(problems) == 1 and "entry 2" in problems[0]
    # where the whole list is no JSON, its entries are parsed one by one, and the line is known
    assert "entry 2, line 3" in problems[0] or json.loads(path.read_bytes())


def test_a_list_without_an_end_is_no_matter_of_a_row(tmp_path: Path):
    path = tmp_path / "r.json"
    for content in (
        b"[" * 100_000,
        b'[{"text": "one"}, {"text": "caf\xe9"}',
        b'[{"text": "one"},',
        b'[{"text": 1}] []',
    ):
        path.write_bytes(content)
        with pytest.raises(ValueError, match="is not valid JSON") as caught:
            skipping(str(path))
        assert not isinstance(caught.value, BadRow)


@given(
    rows=st.lists(st.sampled_from([*BAD_LINES, *(b'{"text": "good %d"}' % i for i in range(9))]), max_size=12),
    ending=st.sampled_from([b"\n", b"\r\n", b"\r", b"\n\n"]),
    marks=st.lists(st.booleans(), min_size=12, max_size=12),
)
def test_every_row_is_read_or_told(tmp_path_factory, rows, ending, marks):
    path = tmp_path_factory.mktemp("rows") / "r.jsonl"
    path.write_bytes(ending.join(MARK * mark + row for row, mark in zip(rows, marks, strict=False)))
    found, problems = skipping(str(path))
    assert texts(found) == [json.loads(row)["text"] for row in rows if b"good" in row]
    assert len(found) + len(problems) == len(rows)
    assert [d.work for d in found] == [f"r.jsonl:{d.work.rpartition(':')[2]}" for d in found]


@pytest.mark.parametrize("suffix", [".jsonl", ".json"])
def test_a_byte_order_mark_costs_no_row(tmp_path: Path, suffix: str):
    rows = [{"text": "one"}, {"text": "two"}]
    lines = "\n".join(map(json.dumps, rows)) if suffix == ".jsonl" else json.dumps(rows)
    (tmp_path / f"r{suffix}").write_bytes(MARK + lines.encode())
    assert texts(load_documents(str(tmp_path / f"r{suffix}"))) == ["one", "two"]


@pytest.mark.parametrize("suffix", [".txt", ".md"])
def test_texts_without_their_mark_and_with_bad_bytes(tmp_path: Path, suffix: str):
    (tmp_path / f"a{suffix}").write_bytes(MARK + "Ähre".encode())
    (tmp_path / f"b{suffix}").write_bytes("Ähre".encode("latin-1"))
    (tmp_path / f"c{suffix}").write_bytes(MARK)
    with pytest.raises(BadRow, match=f"b{suffix}' is not UTF-8 text"):
        load_documents(str(tmp_path))
    found, problems = skipping(str(tmp_path))
    assert found == [Document("a", text="Ähre")] and len(problems) == 1


def test_a_work_that_is_no_text_is_a_bad_row(tmp_path: Path):
    path = tmp_path / "r.jsonl"
    path.write_text('{"text": "one", "book": "A"}\n{"text": "two", "book": "\\udc00"}\n{"text": "three", "book": "C"}')
    found, problems = skipping(str(path), work_field="book")
    assert [d.work for d in found] == ["A", "C"] and "column 'book' in line 2" in problems[0]
    assert split_by_work(found, test_works=["A"])[0] == found[1:]


def bad_parquet(path: Path, count: int, bad: set[int]) -> None:
    """Rows `row 0`, `row 1`, ... of which some are no UTF-8."""
    rows = [b"ro\xff %d" % i if i in bad else b"row %d" % i for i in range(count)]
    buffers = pyarrow.array(rows, pyarrow.binary()).buffers()
    column = pyarrow.Array.from_buffers(pyarrow.string(), count, buffers)
    pyarrow.parquet.write_table(pyarrow.table({"text": column}), path, row_group_size=7)


def test_bad_rows_of_a_parquet_file(tmp_path: Path):
    bad = {0, 5, 6, 39}
    bad_parquet(tmp_path / "r.parquet", 40, bad)
    with pytest.raises(BadRow, match="row 1 of .*r.parquet' cannot be read: 'utf-8'"):
        load_documents(str(tmp_path / "r.parquet"))
    found, problems = skipping(str(tmp_path / "r.parquet"))
    assert texts(found) == [f"row {i}" for i in range(40) if i not in bad]
    assert [problem.split(" of ")[0] for problem in problems] == ["row 1", "row 6", "row 7", "row 40"]


def test_a_damaged_parquet_file_is_no_matter_of_a_row(tmp_path: Path):
    path = tmp_path / "r.parquet"
    rows = [{"text": f"{np.random.default_rng(i).bytes(60).hex()}"} for i in range(500)]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path, row_group_size=100)
    content = bytearray(path.read_bytes())
    content[len(content) // 2 : len(content) // 2 + 3000] = b"\xff" * 3000
    path.write_bytes(content)
    with pytest.raises(ValueError, match="damaged behind row") as caught:
        skipping(str(path))
    assert not isinstance(caught.value, BadRow)


class Failing:
    """A data set whose iterator fails at some rows, and goes on behind them or ends there."""

    features = None

    def __init__(self, count: int, bad: set[int], goes_on: bool, first: int = 0):
        self.count, self.bad, self.goes_on, self.next = count, bad, goes_on, first

    def __iter__(self):
        return self if self.goes_on else self.generate()

    def generate(self):
        while self.next < self.count:
            yield self.__next__()

    def with_format(self, kind: str):
        assert kind == "arrow"
        return self

    def __next__(self) -> pyarrow.Table:
        if self.next == self.count:
            raise StopIteration
        self.next += 1
        if self.next - 1 in self.bad:
            raise TypeError("no such row")
        return pyarrow.table({"text": [f"row {self.next - 1}"]})

    def skip(self, count: int):
        return Failing(self.count, self.bad, self.goes_on, count)


def give(monkeypatch: pytest.MonkeyPatch, rows) -> None:
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: rows)


@pytest.mark.parametrize("bad", [{0}, {1, 2}, {11}, {0, 11}, set(range(3, 12)), set()])
@pytest.mark.parametrize("kind", ["stream", "shuffled", "table", "goes on", "ends"])
def test_a_data_set_goes_on_behind_bad_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, bad: set[int]):
    monkeypatch.setattr(time, "sleep", lambda seconds: None)  # datasets waits 5 s for its threads behind an error
    bad_parquet(tmp_path / "r.parquet", 12, bad)
    if kind in ("goes on", "ends"):
        rows = Failing(12, bad, goes_on=kind == "goes on")
    else:
        options = {"streaming": kind != "table", "cache_dir": str(tmp_path)}
        rows = datasets.load_dataset("parquet", data_files=str(tmp_path / "r.parquet"), split="train", **options)
    give(monkeypatch, rows)
    found, problems = skipping("user/name", streaming=True, seed=1 if kind == "shuffled" else None)
    expected = [f"row {i}" for i in range(12) if i not in bad]
    assert (sorted(texts(found)) == sorted(expected)) if kind == "shuffled" else (texts(found) == expected)
    assert len(problems) == len(bad) and all("'user/name/train:" in problem for problem in problems)


@pytest.mark.parametrize("kind", ["table", "goes on"])
def test_where_nothing_is_read_anew_any_number_of_bad_rows_may_follow_each_other(
    tmp_path: Path, monkeypatch, kind: str
):
    bad = set(range(3, 50))
    bad_parquet(tmp_path / "r.parquet", 52, bad)
    rows = Failing(52, bad, goes_on=True)
    if kind == "table":
        options = {"split": "train", "cache_dir": str(tmp_path)}
        rows = datasets.load_dataset("parquet", data_files=str(tmp_path / "r.parquet"), **options)
    give(monkeypatch, rows)
    found, problems = skipping("user/name")
    assert texts(found) == [f"row {i}" for i in range(52) if i not in bad] and len(problems) == len(bad)


def test_a_data_set_that_is_broken_ends_with_an_error(monkeypatch: pytest.MonkeyPatch):
    give(monkeypatch, Failing(100, set(range(3, 100)), goes_on=False))
    with pytest.raises(ValueError, match="nor can the 10 rows before it: the source is broken") as caught:
        skipping("user/name")
    assert not isinstance(caught.value, BadRow)
    give(monkeypatch, Failing(100, {3}, goes_on=False))
    with pytest.raises(BadRow, match="'user/name/train:3' cannot be read \\(TypeError: no such row"):
        load_documents("user/name")


def test_a_column_that_no_row_can_have_is_said_at_once(monkeypatch: pytest.MonkeyPatch):
    give(monkeypatch, datasets.Dataset.from_list([{"body": "x"}] * 3))
    with pytest.raises(ValueError, match="no column 'text' or 'messages' .* but body"):
        skipping("user/name")


CALLS = [
    {"role": "user", "content": "the weather?"},
    {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "f", "arguments": {"place": "here"}}}]},
]
WALKS_A_MAPPING = (
    "{% for m in messages %}{{ m.role + ':' + m.content }}{% for call in m.tool_calls or [] %}"
    "{% for key, value in call.function.arguments|items %}{{ key + '=' + value }}{% endfor %}{% endfor %}\n"
    "{% endfor %}{% if add_generation_prompt %}assistant:{% endif %}"
)


def test_what_a_template_cannot_render_is_a_bad_row(tmp_path: Path, tokenizer):
    as_text = json.loads(json.dumps(CALLS).replace('{"place": "here"}', '"{\\"place\\": \\"here\\"}"'))
    surrogate = [{"role": "user", "content": "\ud83d"}, {"role": "assistant", "content": "a"}]
    rows = [CALLS, as_text, surrogate, CALLS]
    (tmp_path / "r.jsonl").write_text("\n".join(json.dumps({"messages": row}) for row in rows), encoding="utf-8")
    other = with_template(tokenizer, WALKS_A_MAPPING)
    with pytest.raises(BadRow, match="refuses line 2 of .*r.jsonl' \\(TypeError: .*skip_bad_rows=true counts"):
        read_tokens(str(tmp_path / "r.jsonl"), other, progress=False)
    found, reading = read_tokens(str(tmp_path / "r.jsonl"), other, skip_bad_rows=True, progress=False)
    assert len(found) == 2 and reading.bad_rows == 2
    assert "line 2" in reading.examples[0] and "line 3" in reading.examples[1] and "U+D83D" in reading.examples[1]


def test_a_call_may_stand_without_a_text(tmp_path: Path, tokenizer):
    silent = [CALLS[0], {**CALLS[1], "content": None}]
    rows = [silent, [CALLS[0], {"role": "assistant", "content": None, "tool_calls": None}]]
    (tmp_path / "r.jsonl").write_text("\n".join(json.dumps({"messages": row}) for row in rows), encoding="utf-8")
    other = with_template(tokenizer, WALKS_A_MAPPING.replace("m.content", "(m.content or '')"))
    (found,), reading = read_tokens(str(tmp_path / "r.jsonl"), other, skip_bad_rows=True, progress=False)
    assert tokenizer.decode(found.ids[found.targets]) == "place=here"
    assert reading.bad_rows == 1 and "is not a chat" in reading.examples[0]


def test_a_text_that_the_tokenizer_refuses_costs_no_other(tokenizer):
    class Picky:
        def __call__(self, texts, **options):
            if any("river" in text for text in texts):
                raise TypeError("no rivers")
            return tokenizer(texts, **options)

        def __getattr__(self, name):
            return getattr(tokenizer, name)

    batch = [Document(text, text=text, place=f"line {i}") for i, text in enumerate(["a stone", "the river", "a lamp"])]
    with pytest.raises(BadRow, match="line 1 cannot be tokenised \\(TypeError: no rivers\\)"):
        tokenize_batch(batch, Picky())
    problems: list[str] = []
    found = tokenize_batch(batch, Picky(), on_bad_row=problems.append)
    assert [document.work for document in found] == ["a stone", "a lamp"] and len(problems) == 1
    assert found[1].ids.tolist() == tokenize_batch(batch[2:], tokenizer)[0].ids.tolist()


def test_only_faults_of_rows_recommend_to_skip_them(tmp_path: Path, tokenizer):
    (tmp_path / "r.jsonl").write_text('{"text": "one"}\n{"text": 1}\n')
    for options in ({}, {"seed": 1}):
        with pytest.raises(BadRow, match="skip_bad_rows=true"):
            read_tokens(str(tmp_path / "r.jsonl"), tokenizer, progress=False, **options)
    (tmp_path / "r.json").write_text("[")
    for source in ("r.json", "gone.jsonl"):
        with pytest.raises(ValueError) as caught:
            read_tokens(str(tmp_path / source), tokenizer, skip_bad_rows=True, progress=False)
        assert "skip_bad_rows" not in str(caught.value)


def test_a_suite_names_the_file_and_line_too(tmp_path: Path):
    (tmp_path / "r.jsonl").write_bytes(b'{"question": "\xff"}\n')
    with pytest.raises(BadRow, match="r.jsonl' is not UTF-8 text at line 1"):
        SUITES["gsm8k"].load(source=str(tmp_path / "r.jsonl"))
