"""The documentation's pages agree with the code, the records and each other. `make docs` builds them."""

import ast
import inspect
import json
import re
from pathlib import Path

import pytest
import reference_pages
import repository_links
import result_tables
import torch
from tiny_models import FAMILIES
from tiny_run import make_model

from retention_gates import BoundedCache, RetentionGateConfig
from retention_gates.cli import COMMANDS
from retention_gates.gates.cache.evicting_cache import EvictingCache
from retention_gates.gates.policies import POLICIES, policy
from retention_gates.recipes.comparison import comparison_config
from retention_gates.recipes.loading import packaged_models, run_config

DOCS = Path(__file__).resolve().parents[2] / "docs"


@pytest.mark.parametrize("page", ["results.md", "speed.md"])
def test_tables_are_those_of_the_records(page):
    text = (DOCS / page).read_text(encoding="utf-8")
    assert list(result_tables.names(text)), "no table is marked"
    assert result_tables.filled(text) == text, "run: python docs/result_tables.py"


def test_every_table_is_shown_once():
    shown = [
        name for page in result_tables.PAGES for name in result_tables.names((DOCS / page).read_text(encoding="utf-8"))
    ]
    assert sorted(shown) == sorted(result_tables.TABLES)


def test_a_table_of_mixed_or_missing_records_is_refused(monkeypatch):
    record = {"commit": "a", "gpu": None, "case": "x", "contender": "ours", "value": 1.0, "unit": "s", "limit": None}
    found = [record | {"torch": version, "triton": None} for version in ("2.11", "2.13")]
    monkeypatch.setattr(result_tables, "read", lambda bench: found)
    with pytest.raises(ValueError, match="mixes versions"):
        result_tables.speed("decode", "a", None)
    with pytest.raises(ValueError, match="has no record of b"):
        result_tables.speed("decode", "b", None)
    with pytest.raises(ValueError, match="no table 'of-nothing'"):
        result_tables.filled("<!-- table of-nothing -->\n<!-- end -->")


def test_limits_are_shares_of_the_best_that_is_possible():
    assert result_tables.limits({"value": 50.0, "limit": 200.0, "unit": "tok/s"}) == ["200 tok/s", "0.25"]
    assert result_tables.limits({"value": 50.0, "limit": 20.0, "unit": "ms"}) == ["20 ms", "0.40"]
    assert result_tables.limits({"value": 50.0, "limit": None, "unit": "ms"}) == ["", ""]


def test_the_reference_has_every_key():
    page = reference_pages.configuration()
    sections = run_config.SECTIONS | comparison_config.SINGLE | comparison_config.MANY
    for cls in (run_config.Source, *sections.values()):
        own = vars(cls).get("__annotations__", {})
        keys = run_config.GATE_OPTIONS if cls is run_config.SECTIONS["gate"] else own
        for key in keys:
            assert f"| `{key}` |" in page, f"{cls.__name__}.{key}"
    assert "| `package` | `str \\| None` | `None` | instead of both: an installed Python package" in page
    assert "required" in page and "MISSING" not in page and "<factory>" not in page


def test_the_reference_has_every_command_with_its_options():
    page = reference_pages.commands()
    for command in COMMANDS:
        assert f"## `{command}`" in page and f"usage: retention-gates {command}" in page
    assert page.count("--memory-size") >= 3 and "section.key=value" in page


def test_the_reference_has_every_policy_with_paper_and_tests(monkeypatch):
    facts = {each.policy.name: each for each in reference_pages.all_facts()}
    assert list(facts) == list(POLICIES)
    assert facts["snapkv"].papers == ["2404.14469"] and "window 32 (queries)" in facts["snapkv"].constants
    assert "test_kvpress.py::test_snapkv_window" in facts["snapkv"].tests
    assert "test_policies.py::test_keeps_what_plain_python_keeps" in facts["morphkv"].tests
    assert "The paper looks once" in reference_pages.policy_page()
    monkeypatch.setattr(reference_pages, "policy_tests", lambda name, of: iter(()))
    with pytest.raises(ValueError, match="has no test in tests/gates/policies"):
        reference_pages.all_facts()


def test_signatures_that_are_written_out_are_the_real_ones():
    page = (DOCS / "api.md").read_text(encoding="utf-8")
    real = inspect.signature(BoundedCache).parameters | inspect.signature(EvictingCache).parameters
    real = {name: each for name, each in real.items() if each.kind is not inspect.Parameter.VAR_KEYWORD}
    config = inspect.signature(RetentionGateConfig).parameters
    for name, parameters in (("BoundedCache", real), ("RetentionGateConfig", config)):
        (written,) = re.findall(rf"autoclass:: {name}\((.*)\)", page)
        (function,) = ast.parse(f"def f({written}): ...").body
        assert isinstance(function, ast.FunctionDef)
        arguments = function.args
        plain = dict.fromkeys(each.arg for each in arguments.args)
        plain |= dict(zip(reversed(plain), map(ast.literal_eval, reversed(arguments.defaults)), strict=False))
        for each, default in zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True):
            plain[each.arg] = ast.literal_eval(default) if default is not None else None
        known = {each: parameters[each].default for each in plain}
        assert plain == {each: None if value is inspect.Parameter.empty else value for each, value in known.items()}
        if name == "BoundedCache":
            assert plain.keys() == parameters.keys()


def test_links_between_pages_and_files_exist():
    for page in sorted(DOCS.rglob("*.md")):
        if "generated" not in page.parts:
            repository_links.with_page_links(page.read_text(encoding="utf-8"), page)
    pages = repository_links.repository_pages()
    assert {"README.md", "CONTRIBUTING.md", "kernels/README.md", "recipes/serving/README.md"} <= pages.keys()
    assert "](/generated/repository/kernels/gate_evict/README.md)" in pages["kernels/README.md"]


def test_a_link_to_nothing_is_refused():
    page = DOCS / "guides" / "train.md"
    same = "```\n[x](nothing.md)\n```\n[y](https://example.org/z.md) [z](#here)"
    assert repository_links.with_page_links(same, page) == same
    with pytest.raises(ValueError, match=r"train\.md links to nothing\.md, which does not exist"):
        repository_links.with_page_links("[x](nothing.md)", page)
    assert repository_links.with_page_links("[x](../speed.md#prompts)", page) == "[x](/speed.md#prompts)"
    assert repository_links.with_page_links("[x](../../Makefile)", page) == "x (`Makefile`)"


def test_the_models_that_are_named_are_those_that_are_tested():
    page = (DOCS / "models.md").read_text(encoding="utf-8")
    table = re.search(r"^\| layers with a gate.*?\n\n", page, re.DOTALL | re.MULTILINE)
    assert table and set(re.findall(r"`(\w+)`", table[0])) == set(FAMILIES)


def test_the_notebook_runs(tmp_path, monkeypatch, capsys):
    """On a tiny model in the place of the real one, with which `make docs` runs it."""
    from peft import get_peft_model
    from transformers import AutoModelForCausalLM

    from retention_gates import RetentionTrainingArguments
    from retention_gates.checkpoints import shipped

    folder = make_model(tmp_path / "model", layers=2)
    gated = get_peft_model(AutoModelForCausalLM.from_pretrained(folder), RetentionGateConfig(gate_width=16))
    gated.peft_config["default"].budget_shares = [[20.0, 40.0], [30.0, 70.0]]
    gated.save_pretrained(tmp_path / "adapter")
    monkeypatch.setattr(packaged_models, "find_packaged", lambda package: (str(folder), None))
    monkeypatch.setattr(shipped, "shipped_adapter", lambda: tmp_path / "adapter")
    monkeypatch.chdir(tmp_path)
    real = RetentionTrainingArguments.__init__
    changed = {"max_steps": 2, "use_cpu": True, "output_dir": str(tmp_path / "out")}
    monkeypatch.setattr(
        RetentionTrainingArguments, "__init__", lambda self, **options: real(self, **options | changed)
    )
    notebook = json.loads((DOCS / "notebooks" / "first_steps.ipynb").read_text(encoding="utf-8"))
    cells = ["".join(cell["source"]) for cell in notebook["cells"] if cell["cell_type"] == "code"]
    names: dict[str, object] = {}
    with torch.random.fork_rng():
        for number, cell in enumerate(cells):
            exec(compile(cell, f"cell {number}", "exec"), names)
    printed = capsys.readouterr().out
    assert "entries per head" in printed and "mine" in printed and printed.count("retention") >= 4
    assert all(not cell["outputs"] for cell in notebook["cells"] if cell["cell_type"] == "code"), "clear the outputs"


def test_the_notebooks_policy_is_ten_lines():
    notebook = json.loads((DOCS / "notebooks" / "first_steps.ipynb").read_text(encoding="utf-8"))
    (cell,) = [cell for cell in notebook["cells"] if "MINE = " in "".join(cell["source"])]
    assert len([line for line in cell["source"] if line.strip()]) <= 10
    names: dict[str, object] = {"torch": torch}
    exec("".join(cell["source"]), names)
    assert isinstance(names["MINE"], policy.Policy)
