"""Private names of other packages are there, and stand in compat.py alone. A failure names the one that is gone."""

import ast
import inspect
import re
import sys
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from transformers import LlamaConfig

from retention_gates import compat

ROOT = Path(__file__).resolve().parents[2]
FOLDERS = ("gates", "kernels", "trainers", "checkpoints", "recipes", "data", "src")
FILES = [path for folder in FOLDERS for path in sorted((ROOT / folder).rglob("*.py"))]
MEMBERS = [(place, name) for place, names in compat.PRIVATE_MEMBERS.items() for name in names]
LISTED = {name for _, name in MEMBERS}
DOCUMENTED = {"_asdict", "_fields", "_replace", "_exit"}  # of named tuples and os
BY_NAME = ("getattr", "hasattr", "setattr", "delattr")


class Access(NamedTuple):
    line: int
    owner: str
    name: str


def is_private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__")


def defined_in(tree: ast.AST) -> Iterator[str]:
    """Names that the file gives to functions, classes, variables and attributes of its own objects."""
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            yield node.name
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.id
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store) and is_own(ast.unparse(node.value)):
            yield node.attr


def is_own(owner: str) -> bool:
    return owner in ("self", "cls", "super()")


def private_names(tree: ast.AST) -> Iterator[Access]:
    """Attributes with a leading underscore, by name too, and such parts of what is imported from other packages."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and is_private(node.attr):
            yield Access(node.lineno, ast.unparse(node.value), node.attr)
        elif isinstance(node, ast.Call) and ast.unparse(node.func) in BY_NAME:
            name = node.args[1].value if len(node.args) > 1 and isinstance(node.args[1], ast.Constant) else ""
            if is_private(name):
                yield Access(node.lineno, ast.unparse(node.args[0]), name)
        elif isinstance(node, ast.Import):
            imported = [part for each in node.names for part in each.name.split(".")]
            yield from (Access(node.lineno, "import", part) for part in imported if is_private(part))
        elif isinstance(node, ast.ImportFrom) and not str(node.module).startswith("retention_gates"):
            imported = [*str(node.module).split("."), *(each.name for each in node.names)]
            yield from (Access(node.lineno, str(node.module), part) for part in imported if is_private(part))


def foreign(tree: ast.AST, own: set[str]) -> list[Access]:
    """Private names of others: on our own objects those that neither we nor the list of members have."""
    return [
        each
        for each in private_names(tree)
        if each.name not in DOCUMENTED
        and each.name not in own - LISTED
        and not (is_own(each.owner) and each.name in own | LISTED)
    ]


@pytest.mark.parametrize("name", compat.PRIVATE)
def test_a_private_name_is_there(name):
    place, purpose = compat.PRIVATE[name]
    try:
        found = compat.find_private(place)
    except (ImportError, AttributeError) as error:
        pytest.fail(f"{place} is gone, which is needed for {purpose}: {error}")
    assert getattr(compat, name) == found


@pytest.mark.parametrize(("place", "name"), MEMBERS)
def test_a_private_member_is_there(place, name):
    instances = {"torch.nn:Module": torch.nn.Module, "transformers:PreTrainedConfig": LlamaConfig}
    instances["torch:UntypedStorage"] = lambda: torch.zeros(1).untyped_storage()
    owner = instances[place]() if place in instances else compat.find_private(place)
    if not hasattr(owner, name):  # what a method sets
        assert re.search(rf"\.{name}\b", inspect.getsource(owner)), f"{name} of {place} is gone"


def test_what_is_not_listed_has_no_name_here():
    with pytest.raises(AttributeError, match="no attribute 'tree_branches'"):
        compat.tree_branches  # noqa: B018


def test_private_names_stand_in_one_file():
    trees = {path: ast.parse(path.read_text("utf-8")) for path in FILES}
    own = {name for tree in trees.values() for name in defined_in(tree)}
    found = [
        f"{path.relative_to(ROOT)}:{each.line}: {each.name} of {each.owner}"
        for path, tree in trees.items()
        if path.name != "compat.py"
        for each in foreign(tree, own)
    ]
    assert found == []


@pytest.mark.parametrize(
    "line",
    [
        "from torch.utils._pytree import tree_leaves",
        "from torch.nn.modules.module import _global_hooks",
        "import torch._dynamo",
        "x = torch._foreach_mul(y)",
        "model.layers[0]._forward_hooks.clear()",
        "getattr(config, '_commit_hash', None)",
        "def f(self): return self._unlisted",
        "trainer._save(folder)",  # a name that we override is still another's
    ],
)
def test_the_search_finds(line):
    own = {"_save", *defined_in(ast.parse("class A:\n    def _save(self): self._ours = 1"))}
    assert len(foreign(ast.parse(line), own)) == 1


@pytest.mark.parametrize(
    "line",
    [
        "import torch.utils.data",
        "from retention_gates.gates import _ours",
        "config.__class__",
        "def f(self): self._ours = super()._save()",
        "other._ours",
        "pair._replace(first=1)",
    ],
)
def test_the_search_leaves_our_own(line):
    assert foreign(ast.parse(line), {"_ours", "_save"}) == []


def test_private_methods_that_we_override_are_listed():
    """A class of another package that calls one by another name would no longer call ours."""
    import_module("retention_gates.trainers.trainer")
    modules = [module for name, module in [*sys.modules.items()] if name.startswith("retention_gates.")]
    ours = {each for module in modules for each in vars(module).values() if inspect.isclass(each)}
    overridden = {
        name
        for each in ours
        if each.__module__.startswith("retention_gates")
        for base in each.__mro__[1:]
        if base.__module__.split(".")[0] in ("torch", "transformers", "peft", "accelerate")
        for name in vars(each).keys() & vars(base).keys()
        if is_private(name)
        and name not in ("_backward_cls", "_abc_impl")  # which torch and Python make for each class
    }
    assert {"_save", "_prepare_model", "_apply"} <= overridden <= LISTED


def test_what_shares_memory_has_one_number_and_writes_are_counted():
    x = torch.zeros(4)
    assert compat.storage_id(x) == compat.storage_id(x[1:]) != compat.storage_id(x.clone())
    before = compat.writes_to(x)
    x[:2].add_(1)
    assert compat.writes_to(x) == before + 1
    assert compat.operator_schema(torch.ops.aten.add_.Tensor).is_mutable
    assert compat.operator_schema(torch.nn.functional.relu) is None
