"""Pages that are written when the documentation is built: keys of YAML files, options of commands, and policies."""

import ast
import importlib
import inspect
import os
import pkgutil
import re
import tokenize
from collections.abc import Iterator
from contextlib import redirect_stdout, suppress
from dataclasses import MISSING, Field, dataclass, fields
from io import StringIO
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest.mock import patch

from repository_links import repository_pages
from transformers import TrainingArguments

from retention_gates.cli import COMMANDS, build_parser
from retention_gates.gates import policies
from retention_gates.gates.policies import POLICIES, FeedbackPolicy, Policy, ScoredPolicy
from retention_gates.recipes.comparison import comparison_config
from retention_gates.recipes.loading import run_config
from retention_gates.trainers.config import RetentionTrainingArguments

ROOT = Path(__file__).resolve().parents[1]
POLICY_TESTS = ROOT / "tests" / "gates" / "policies"


def write(folder: Path) -> None:
    """Writes the pages into a folder, each only if it has changed, so that Sphinx reads no page twice."""
    pages = {"configuration.md": configuration(), "commands.md": commands(), "policies.md": policy_page()}
    pages |= {f"repository/{path}": text for path, text in repository_pages().items()}
    for name, text in pages.items():
        page = folder / name
        page.parent.mkdir(parents=True, exist_ok=True)
        if not page.exists() or page.read_text(encoding="utf-8") != text:
            page.write_text(text, encoding="utf-8")


def configuration() -> str:
    """Returns the page of all keys that the YAML files of `train` and `evaluate` may have."""
    parts = [
        "# Configuration reference",
        "Written from the dataclasses that read the files. Any key can be given on the command line as "
        "`section.key=value`; an unknown key is an error that names the nearest.",
        "## A training run: `retention-gates train`",
        "The top level has one more key, `resume: true`, which goes on from the last checkpoint.",
    ]
    for section, cls in run_config.SECTIONS.items():
        parts += [f"### `{section}`", paragraph(cls)]
        if cls is RetentionTrainingArguments:
            given = {each.name for each in fields(TrainingArguments)}
            own = [each for each in fields(cls) if each.name in vars(cls).get("__annotations__", {})]
            parts += ["Keys that only this trainer has:", table(cls, [each for each in own if each.name not in given])]
            parts += [
                "Keys of transformers' `TrainingArguments` with another default here. The others are as transformers "
                "documents them, apart from those that gates have no use for, which are refused with the reason.",
                table(cls, [each for each in own if each.name in given]),
            ]
        elif section == "gate":
            parts.append(table(cls, [each for each in fields(cls) if each.name in run_config.GATE_OPTIONS]))
        else:
            parts.append(table(cls, list(fields(cls))))
        if section == "data":
            parts += ["#### An entry of `data.sources`", paragraph(run_config.Source)]
            parts.append(table(run_config.Source, list(fields(run_config.Source))))
    parts.append("## A comparison: `retention-gates evaluate`")
    sections = {f"{name}.NAME": cls for name, cls in comparison_config.MANY.items()} | comparison_config.SINGLE
    for section, cls in sections.items():
        parts += [f"### `{section}`", paragraph(cls), table(cls, list(fields(cls)))]
    return "\n\n".join(parts) + "\n"


def commands() -> str:
    """Returns the page with the help of every command."""
    parts = ["# Commands", "As `retention-gates COMMAND --help` prints it."]
    for name in COMMANDS:
        printed = StringIO()
        with redirect_stdout(printed), patch.dict(os.environ, COLUMNS="100"), suppress(SystemExit):
            build_parser(name).parse_args([name, "--help"])
        parts.append(f"## `{name}`\n\n```text\n{printed.getvalue().rstrip()}\n```")
    return "\n\n".join(parts) + "\n"


def paragraph(cls: type) -> str:
    """Returns the first paragraph of a class's docstring on one line."""
    return " ".join((inspect.getdoc(cls) or "").split("\n\n")[0].split())


def table(cls: type, chosen: list[Field[Any]]) -> str:
    """Returns a Markdown table of a dataclass's fields: name, type, default, and what it says of itself."""
    comments = field_comments(cls)
    lines = ["| key | type | default | |", "|---|---|---|---|"]
    for each in chosen:
        help_text = each.metadata.get("help") or comments.get(each.name, "")
        lines.append(f"| `{each.name}` | {kind(each)} | {default(each)} | {cell(help_text)} |")
    return "\n".join(lines)


def kind(each: Field[Any]) -> str:
    name = each.type if isinstance(each.type, str) else inspect.formatannotation(each.type)
    return f"`{cell(name.replace('typing.', ''))}`"


def default(each: Field[Any]) -> str:
    if each.default_factory is not MISSING:
        source = each.default_factory()
        return f"`{source!r}`" if each.name != "report_to" else "where installed, `['tensorboard']`"
    return "required" if each.default is MISSING else f"`{each.default!r}`"


def cell(text: str) -> str:
    """Returns text for a cell of a table, in which a bar would end it."""
    return text.replace("|", "\\|").replace("<", "&lt;")


def field_comments(cls: type) -> dict[str, str]:
    """Returns the comments at the ends of a class's lines, by the name that each line begins with."""
    found = {}
    for token in tokenize.generate_tokens(StringIO(inspect.getsource(cls)).readline):
        name = re.match(r"\s*(\w+)\s*:", token.line)
        if token.type == tokenize.COMMENT and name and not token.string.startswith(("# type:", "# noqa")):
            found[name[1]] = token.string.removeprefix("#").strip()
    return found


@dataclass
class PolicyFacts:
    """A policy with what its file and its tests say of it."""

    policy: Policy
    module: ModuleType
    papers: list[str]  # arXiv numbers, in the file's order
    constants: list[str]  # the file's own numbers, with their comments
    tests: list[str]  # those that compare it with something written independently

    @property
    def title(self) -> str:
        return (self.module.__doc__ or "").strip().split("\n")[0].rstrip(".")


def all_facts() -> list[PolicyFacts]:
    """Returns the facts of every policy, in the order in which the commands list them.

    Raises:
        ValueError: for a policy whose file names no source, or that no test names.
    """
    modules = {id(policy): module for module in policy_modules() for policy in policies_of(module)}
    found = []
    for name, policy in POLICIES.items():
        module = modules[id(policy)]
        source = inspect.getsource(module)
        papers = list(dict.fromkeys(re.findall(r"arxiv\.org/abs/(\d{4}\.\d{4,5})", source)))
        tests = sorted(policy_tests(name, policy))
        if not papers or not tests:
            missing = "arXiv address" if not papers else f"test in {POLICY_TESTS.relative_to(ROOT)}"
            raise ValueError(f"The policy {name!r} ({module.__name__}) has no {missing}: every policy needs one.")
        constants = re.findall(r"^([A-Z_]+) = ([\d.]+)(?:  # (.*))?$", source, re.MULTILINE)
        found.append(PolicyFacts(policy, module, papers, [constant(*each) for each in constants], tests))
    return found


def constant(name: str, value: str, comment: str) -> str:
    return f"{name.lower().replace('_', ' ')} {value}" + (f" ({comment})" if comment else "")


def policy_modules() -> Iterator[ModuleType]:
    for info in pkgutil.iter_modules(policies.__path__):
        yield importlib.import_module(f"{policies.__name__}.{info.name}")


def policies_of(module: ModuleType) -> list[Policy]:
    """Returns the policies that a module makes; those that it imports are made elsewhere."""
    made = {node.targets[0].id for node in ast.parse(inspect.getsource(module)).body if is_assignment(node)}
    return [value for name, value in vars(module).items() if name in made and isinstance(value, Policy)]


def is_assignment(node: ast.stmt) -> bool:
    return isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name)


def policy_tests(name: str, policy: Policy) -> Iterator[str]:
    """Yields the tests that name a policy, or that run for all policies of its kind."""
    groups = {"FED_BACK"} if isinstance(policy, FeedbackPolicy) else {"SCORED"}
    for path in sorted(POLICY_TESTS.glob("test_*.py")):
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if not isinstance(node, ast.FunctionDef) or not node.name.startswith("test_"):
                continue
            inside = list(ast.walk(node))
            named = {each.value for each in inside if isinstance(each, ast.Constant) and isinstance(each.value, str)}
            if name in named or groups & {each.id for each in inside if isinstance(each, ast.Name)}:
                yield f"{path.name}::{node.name}"


def policy_page() -> str:
    """Returns the page with a table of all policies and a section for each."""
    found = all_facts()
    lines = ["| policy | paper | known | settings |", "|---|---|---|---|"]
    for each in found:
        papers = ", ".join(f"[{paper}](https://arxiv.org/abs/{paper})" for paper in each.papers)
        known = "ahead" if isinstance(each.policy, ScoredPolicy) else "fed back"
        lines.append(f"| [`{each.policy.name}`](#{each.policy.name}) | {papers} | {known} | {settings(each)} |")
    parts = [
        "# Policies",
        "Every policy runs in the same cache under the same rule, so that a comparison differs in nothing else. A "
        "policy *known ahead* sets a score when a token is created; one that is *fed back* looks at what is held "
        "and at the attention that it receives. Written from `gates/policies/`; CONTRIBUTING.md shows how to add one.",
        "\n".join(lines),
        "Protected tokens are the cache's: by default as many as the adapter was trained with, so 4 for untrained "
        "policies without an adapter of their own. `streaming_llm` is a window with these as its attention sinks.",
    ]
    for each in found:
        parts += [f"({each.policy.name})=", f"## `{each.policy.name}`", f"{each.title}.", *notes(each)]
        parts.append("Tests: " + ", ".join(f"`{test}`" for test in each.tests) + ".")
    return "\n\n".join(parts) + "\n"


def settings(each: PolicyFacts) -> str:
    policy, parts = each.policy, list(each.constants)
    if policy.recent_fraction:
        limit = "" if policy.most_recent is None else f", at most {policy.most_recent}"
        parts.append(f"youngest {policy.recent_fraction:.0%} of a budget stay{limit}")
    if not policy.keeps_sinks:
        parts.append("no attention sinks")
    if isinstance(policy, FeedbackPolicy) and policy.interval > 1:
        parts.append(f"priorities renewed every {policy.interval} steps")
    if policy.needs_gates:
        parts.append("needs trained gates")
    return cell("; ".join(parts)) or "none"


def notes(each: PolicyFacts) -> list[str]:
    """Returns the docstrings of the functions that a policy consists of: the equation, and where it departs."""
    functions = [value for value in vars(each.policy).values() if inspect.isfunction(value)]
    of_this_file = [function for function in functions if function.__module__ == each.module.__name__]
    texts = [inspect.getdoc(function) for function in dict.fromkeys(of_this_file)]
    return [re.sub(r"(?m)^(Source: )", r"\1", text) for text in texts if text]
