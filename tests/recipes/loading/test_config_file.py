"""YAML files of runs: what they may not hold is named with its place."""

import time

import pytest
import yaml

from retention_gates.recipes.loading.config_file import DEEPEST, parse, read


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("data: {}\ntraining:\n  seed: 1\n  max_steps: 2\n  seed: 3\n", "'seed' stands in line 3 and again in line 5"),
        ("data: 1\nmodel: 2\ndata: 3\n", "'data' stands in line 1 and again in line 3"),
        ("data: {a: 1, b: 2, a: 3}\n", "'a' stands in line 1 and again in line 1"),
        ("data: " + "[" * 20_000 + "]" * 20_000, f"more than {DEEPEST} levels of brackets"),
        ("data: " + "{a: " * 20_000, f"more than {DEEPEST} levels of brackets"),
        ("- a\n- b\n", "must hold sections"),
        ("", "must hold sections"),
        ("a: [b", "is no YAML"),
    ],
)
def test_what_is_refused_at_once(tmp_path, text, said):
    path = tmp_path / "run.yaml"
    path.write_text(text, encoding="utf-8")
    began = time.monotonic()
    with pytest.raises(ValueError, match=said):
        read(path, ("data",))
    assert time.monotonic() - began < 2


def test_what_is_allowed(tmp_path):
    text = "base: &base {a: 1}\nother:\n  <<: *base\n  b: [[1], {c: [2]}]\nthird: {a: 1}\n"
    assert parse(text) == yaml.safe_load(text)
    path = tmp_path / "run.yaml"
    path.write_bytes(b"\xef\xbb\xbf" + text.encode())  # as some editors begin a file
    assert read(path, ("base",)) == yaml.safe_load(text)
