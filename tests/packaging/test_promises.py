"""The page of promises: every test that it names is there, and so is every fuzzer of its figures."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "promises.md"
TEXT = PAGE.read_text(encoding="utf-8")
NAMED = re.findall(r"`(tests/[\w/]+\.py)(?:::(\w+))?`", TEXT)


def functions(file: Path) -> set[str]:
    tree = ast.parse(file.read_text(encoding="utf-8"))
    return {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}


@pytest.mark.parametrize(("file", "test"), NAMED, ids=[test or file for file, test in NAMED])
def test_a_test_that_is_named_is_there(file, test):
    assert any(name.startswith("test_") and test in ("", name) for name in functions(ROOT / file))


def test_every_promise_names_its_test():
    rows = [line for line in TEXT.splitlines() if re.match(r"\| [A-Z]", line)]
    assert len(rows) == len(NAMED) > 15 and all("`tests/" in row for row in rows)


def test_figures_are_of_fuzzers_that_there_are():
    figures = re.findall(r"^\| `(\w+)` \| \d+ \| [\d,]+ \| \d+ \| [\d,]+ \|$", TEXT, re.MULTILINE)
    tree = ast.parse((ROOT / "tests" / "fuzz" / "fuzzers.py").read_text(encoding="utf-8"))
    (fuzzers,) = [node for node in tree.body if isinstance(node, ast.AnnAssign) and node.target.id == "FUZZERS"]
    names = {key.value for key in fuzzers.value.keys}
    assert figures and set(figures) <= names
    assert set(re.findall(r"^- `(\w+)`:", TEXT, re.MULTILINE)) >= set(figures), "each says what it checks"
    for only in re.findall(r"--only (\w+)", TEXT):
        assert only in names


@pytest.mark.parametrize("file", ["README.md", "CONTRIBUTING.md"])
def test_the_page_is_linked(file):
    assert "(docs/promises.md)" in (ROOT / file).read_text(encoding="utf-8")
