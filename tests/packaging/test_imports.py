"""What is imported is asked for in pyproject.toml, and benches import at the top."""

import ast
import sys
import tomllib
from collections.abc import Iterator
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[2]
FOLDERS = ("src", "kernels", "gates", "trainers", "data", "checkpoints", "recipes")
FILES = [path for folder in FOLDERS for path in sorted((ROOT / folder).rglob("*.py")) if "results" not in path.parts]
KNOWN = packages_distributions()
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
DEPENDENCIES = {canonicalize_name(Requirement(each).name) for each in PROJECT["project"]["dependencies"]}
EXTRAS = PROJECT["project"]["optional-dependencies"]
OPTIONAL = {canonicalize_name(Requirement(each).name) for extra in EXTRAS.values() for each in extra}
MAY_BE_MISSING = (ast.FunctionDef, ast.AsyncFunctionDef, ast.Try, ast.If)
# subclasses of uvicorn's classes, which `serve` imports once it has asked for the packages; import_all.py has them too
SERVER = ("recipes/serving/connections.py", "recipes/serving/server.py")
RIVALS = {"kvpress"}  # a bench compares with it where it is installed


def imports(node: ast.AST, inside: bool = False) -> Iterator[tuple[str, bool]]:
    """Gives what is imported at run time, by its first name, and whether a function or a condition does it."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
            continue
        if isinstance(child, ast.Import):
            yield from ((name.name.split(".")[0], inside) for name in child.names)
        elif isinstance(child, ast.ImportFrom):
            yield str(child.module).split(".")[0], inside
        else:
            yield from imports(child, inside or isinstance(child, MAY_BE_MISSING))


def names(path: Path, *, inside: bool) -> set[str]:
    found = {name for name, within in imports(ast.parse(path.read_text("utf-8"))) if within == inside}
    return found - sys.stdlib_module_names - {"retention_gates"}


def distributions(modules: set[str]) -> set[str]:
    return {canonicalize_name(each) for name in modules for each in KNOWN.get(name, [name])}


def test_what_is_imported_at_the_top_is_a_dependency():
    found = {str(path.relative_to(ROOT)): distributions(names(path, inside=False)) - DEPENDENCIES for path in FILES}
    for path in SERVER:
        found[path].remove("uvicorn")
    assert {path: missing for path, missing in found.items() if missing} == {}


def test_what_functions_import_is_a_dependency_or_an_extra():
    allowed = DEPENDENCIES | OPTIONAL | RIVALS | {"starlette", "lm-eval"}  # starlette: a part of fastapi
    found = {str(path.relative_to(ROOT)): distributions(names(path, inside=True)) - allowed for path in FILES}
    assert {path: missing for path, missing in found.items() if missing} == {}


@pytest.mark.parametrize("path", sorted((ROOT / "recipes" / "bench").glob("*.py")), ids=lambda path: path.stem)
def test_functions_of_a_bench_import_only_what_is_optional(path):
    found = {name for name, inside in imports(ast.parse(path.read_text("utf-8"))) if inside}
    assert distributions(found) <= OPTIONAL | RIVALS


def test_imports_are_seen():
    lines = (
        "import a.b, c",
        "if TYPE_CHECKING:",
        "    import d",
        "def f():",
        "    with g:",
        "        from e.g import h",
    )
    assert list(imports(ast.parse("\n".join(lines)))) == [("a", False), ("c", False), ("e", True)]


def test_only_files_with_functions_for_triton_may_leave_types_out():
    def compiled(path: Path) -> bool:
        functions = [
            node for node in ast.walk(ast.parse(path.read_text("utf-8"))) if isinstance(node, ast.FunctionDef)
        ]
        return any("jit" in ast.unparse(each) for function in functions for each in function.decorator_list)

    files = sorted((ROOT / "kernels").rglob("*.py"))
    expected = {
        ".".join(["retention_gates", *path.relative_to(ROOT).with_suffix("").parts])
        for path in files
        if compiled(path)
    }
    (excepted,) = [each for each in PROJECT["tool"]["mypy"]["overrides"] if "disallow_untyped_defs" in each]
    assert set(excepted["module"]) == expected
