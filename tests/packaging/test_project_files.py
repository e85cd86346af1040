"""The files that describe the project agree with the package and with the pins, and GitHub can read its forms."""

import re
import tomllib
from pathlib import Path

import pytest
import yaml

import retention_gates

ROOT = Path(__file__).resolve().parents[2]
FORMS = sorted((ROOT / ".github" / "ISSUE_TEMPLATE").glob("*.yml"))
FIELDS = {"input", "textarea", "dropdown", "checkboxes"}


def read(*parts: str) -> dict:
    return yaml.safe_load(ROOT.joinpath(*parts).read_text(encoding="utf-8"))


def test_commits_are_checked_by_the_pinned_ruff():
    (hooks,) = read(".pre-commit-config.yaml")["repos"]
    pinned = re.search(r"^ruff==(.+)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    assert pinned and hooks["rev"] == f"v{pinned[1]}"
    assert [each["id"] for each in hooks["hooks"]] == ["ruff-check", "ruff-format"]


def test_the_citation_is_of_this_version():
    citation = read("CITATION.cff")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert citation["cff-version"] == "1.2.0" and {"message", "title", "authors"} <= citation.keys()
    assert citation["title"] == project["name"] and citation["license"] == project["license"]
    assert citation["version"] == retention_gates.__version__
    assert set(project["urls"].values()) <= {each["url"] for each in citation["references"]}


def test_the_changelog_has_this_version_with_its_headings():
    text = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    (newest,) = re.findall(
        rf"^## {re.escape(retention_gates.__version__)} .*?(?=^## |\Z)", text, re.MULTILINE | re.DOTALL
    )
    headings = re.findall(r"^### (.+)$", newest, re.MULTILINE)
    order = ["Added", "Changed", "Deprecated", "Removed", "Fixed"]
    assert headings and headings == [each for each in order if each in headings]
    assert newest.index("### ") < newest.index("- "), "an entry stands under no heading"


def test_the_workflow_runs_what_must_pass():
    steps = read(".github", "workflows", "ci.yml")["jobs"]["run"]["steps"]
    assert {"run": "bash .ci/run"} in steps


@pytest.mark.parametrize("form", [each.name for each in FORMS if each.name != "config.yml"])
def test_forms_are_complete(form):
    content = read(".github", "ISSUE_TEMPLATE", form)
    assert content["name"] and content["description"]
    fields = [each for each in content["body"] if each["type"] != "markdown"]
    assert fields and {each["type"] for each in fields} <= FIELDS
    names = [each["id"] for each in fields]
    assert len(names) == len(set(names)) and all(each["attributes"]["label"] for each in fields)
    assert any(each.get("validations", {}).get("required") for each in fields)


def test_there_are_forms():
    assert {"model_refused.yml", "new_policy.yml"} <= {each.name for each in FORMS}
