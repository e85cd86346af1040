"""Docstrings are said in plain English, as far as a program can tell."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
FOLDERS = ("kernels", "gates", "trainers", "data", "checkpoints", "recipes", "docs", "src/retention_gates")
QUESTIONS = {"what", "who", "whom", "whose", "which", "how"}
DOCUMENTED = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)


def docstrings(source: str) -> list[str]:
    nodes = [node for node in ast.walk(ast.parse(source)) if isinstance(node, DOCUMENTED)]
    return [text for node in nodes if (text := ast.get_docstring(node))]


def begins_with_a_question(text: str) -> bool:
    return text.split(maxsplit=1)[0].lower().rstrip(",'") in QUESTIONS


@pytest.mark.parametrize("folder", FOLDERS)
def test_docstrings_begin_with_a_verb_or_the_thing_they_give(folder):
    files = sorted((ROOT / folder).rglob("*.py"))
    assert files
    texts = [(file.relative_to(ROOT), text) for file in files for text in docstrings(file.read_text(encoding="utf-8"))]
    assert [(str(file), text.splitlines()[0]) for file, text in texts if begins_with_a_question(text)] == []


def test_questions_are_found():
    source = '"""Returns it."""\ndef f():\n    """What it is."""\nclass A:\n    """Whatever."""\n'
    assert [text for text in docstrings(source) if begins_with_a_question(text)] == ["What it is."]
