"""retention-gates calibrate: shares measured, stored, and used."""

import json
import os

import pytest
from tiny_adapter import Files, make_files

from retention_gates import find_gated_model
from retention_gates.cli import main
from retention_gates.gates.cache import BoundedCache
from retention_gates.recipes import calibrate
from retention_gates.recipes.loading import rows as text_rows
from retention_gates.recipes.loading.models import load_model


@pytest.fixture
def files(tmp_path) -> Files:
    return make_files(tmp_path)


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_only_the_shares_change(files):
    before = contents(files.adapter)
    assert main(["calibrate", *files.arguments, "--rows", "2", "--length", "64"]) == 0
    after = contents(files.adapter)
    assert before.keys() == after.keys()
    assert [name for name in before if before[name] != after[name]] == ["adapter_config.json"]
    old, new = (json.loads(each["adapter_config.json"]) for each in (before, after))
    shares = new.pop("budget_shares")
    assert old.pop("budget_shares") is None and old == new
    assert [len(row) for row in shares] == [2] * 4 and all(share > 4 for row in shares for share in row)


def test_the_stored_shares_divide_the_memory(files):
    assert main(["calibrate", *files.arguments, "--rows", "2", "--length", "64"]) == 0
    model = load_model(None, str(files.adapter))
    shares = find_gated_model(model).active_config.budget_shares
    entries = BoundedCache(model, memory_size=32).budgets
    assert sum(map(sum, entries)) == 32 * 8
    ranked = [pair for row in zip(shares, entries, strict=True) for pair in zip(*row, strict=True)]
    assert [entry for _, entry in sorted(ranked)] == sorted(entry for _, entry in ranked)
    assert len({entry for _, entry in ranked}) > 2


@pytest.mark.parametrize("set_aside", [["--test-works", "work3"], ["--test-fraction", "0.25"]])
def test_the_works_set_aside_are_left_out(files, set_aside, monkeypatch):
    read = []

    def load_rows(options, tokenizer, documents):
        test = text_rows.load_token_documents(options, tokenizer)
        read.append([{tuple(document.ids) for document in each} for each in (documents, test)])
        return text_rows.load_rows(options, tokenizer, documents)

    monkeypatch.setattr(calibrate, "load_rows", load_rows)
    assert main(["calibrate", *files.arguments, "--rows", "3", "--length", "64", *set_aside]) == 0
    ((train, test),) = read
    assert train and test and len(train) + len(test) == 4 and not train & test


def test_a_copy(files, tmp_path):
    before, copy = contents(files.adapter), tmp_path / "copy"
    assert main(["calibrate", *files.arguments, "--rows", "1", "--length", "64", "--output", str(copy)]) == 0
    assert contents(files.adapter) == before
    assert contents(copy).keys() == before.keys() | {".retention-gates"}
    assert find_gated_model(load_model(None, str(copy))).active_config.budget_shares is not None


def test_a_full_disk_leaves_the_adapter(files, monkeypatch):
    before = contents(files.adapter)

    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    assert main(["calibrate", *files.arguments, "--rows", "1", "--length", "64"]) == 2
    assert contents(files.adapter) == before


def test_a_full_disk_leaves_no_half_copy(files, tmp_path, monkeypatch):
    copy, sync, synced = tmp_path / "copy", os.fsync, []

    def full_at_third(descriptor):
        synced.append(descriptor)
        if len(synced) == 3:  # the card and the weights are there
            raise OSError(28, "No space left on device")
        sync(descriptor)

    monkeypatch.setattr("os.fsync", full_at_third)
    assert main(["calibrate", *files.arguments, "--rows", "1", "--length", "64", "--output", str(copy)]) == 2
    assert "adapter_config.json" not in contents(copy)


def test_an_adapter_of_the_hub_is_not_changed(files, capsys):
    assert main(["calibrate", "--adapter", "someone/adapter", "--text", str(files.texts)]) == 2
    assert "Download an adapter of the Hub first" in capsys.readouterr().err
