"""Stored scores: found again, dropped when torn, refused when damaged."""

import json

import pytest

from retention_gates.recipes.comparison.result_store import STORE, ResultStore

ONE, OTHER = {"tokens": "ab", "seed": 0}, {"seed": 1, "tokens": "ab"}


@pytest.fixture
def folder(tmp_path):
    store = ResultStore(tmp_path / "out")
    assert not (tmp_path / "out").exists(), "nothing is made before the first result"
    store.add([(ONE, [{"kl": 0.5}]), (OTHER, [{"kl": 0.25}, {"kl": 0.1}])])
    return tmp_path / "out"


def test_what_was_stored_is_found_whatever_the_order_of_keys(folder):
    store = ResultStore(folder)
    assert store.get({"seed": 0, "tokens": "ab"}) == [{"kl": 0.5}]
    assert store.get(OTHER) == [{"kl": 0.25}, {"kl": 0.1}]
    assert store.get({"tokens": "ab", "seed": 2}) is None


def test_every_place_where_a_run_can_be_cut_off(folder, capsys):
    whole = (folder / STORE).read_bytes()
    first = whole.index(b"\n") + 1
    for length in range(first, len(whole)):
        (folder / STORE).write_bytes(whole[:length])
        store = ResultStore(folder)
        assert store.get(ONE) is not None and store.get(OTHER) is None
        assert ("is dropped" in capsys.readouterr().out) == (length > first)
        store.add([(OTHER, [{"kl": 0.25}, {"kl": 0.1}])])
        assert (folder / STORE).read_bytes() == whole


@pytest.mark.parametrize(
    "damage",
    [
        lambda line: line.replace(b"0.5", b"0.4"),
        lambda line: line[:-5],
        lambda line: b'{"kl": 0.5}',
        lambda line: b"[1, 2]",
        lambda line: b"",
        lambda line: b"\xff\xfe",
        lambda line: json.dumps({"unit": ONE, "records": [], "hash": None}).encode(),
    ],
)
def test_a_damaged_or_foreign_line_is_refused(folder, damage):
    first, *rest = (folder / STORE).read_bytes().split(b"\n")
    (folder / STORE).write_bytes(b"\n".join([damage(first), *rest]))
    with pytest.raises(ValueError, match="Line 1 of .* is damaged .* delete that line"):
        ResultStore(folder)


def test_a_folder_that_is_not_ours_is_left_alone(tmp_path):
    (tmp_path / "thesis.txt").write_text("years of work", encoding="utf-8")
    with pytest.raises(ValueError, match="was not written by retention-gates"):
        ResultStore(tmp_path).add([(ONE, [])])
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]
