"""The model card says what the adapter's and the run's files say, and nothing else."""

import json
import shutil

import pytest
import yaml
from tiny_adapter import make_files

from retention_gates import __version__
from retention_gates.checkpoints.card import CardFacts, model_card, with_metadata
from retention_gates.checkpoints.evaluation_files import report_of
from retention_gates.cli import main as command

BASE = ["--base-model", "org/tiny"]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return make_files(tmp_path_factory.mktemp("card"))


@pytest.fixture
def run(made, tmp_path):
    """A run's folder, as train leaves it: adapter, run.yaml and log.jsonl."""
    shutil.copytree(made.adapter, tmp_path / "run" / "adapter")
    recipe = {
        "model": {"name": str(made.model)},
        "gate": {"gate_width": 16},
        "data": {"sources": ["org/texts", {"source": "/home/somebody/plays", "limit": 3}], "row_length": 48},
        "training": {"output_dir": "/home/somebody/out", "objective": "layerwise", "memory_size": 8, "max_steps": 8},
    }
    (tmp_path / "run" / "run.yaml").write_text(yaml.safe_dump(recipe))
    logs = [
        {"step": 7, "loss": 0.5, "layer_error": 0.25, "learning_rate": 0.01},
        {"step": 8, "loss": 0.25, "layer_error": 0.125, "learning_rate": 0.001, "retained_mass/layer_0": 4.0},
        {"step": 8, "eval_kl": 0.3},
        {"step": 8, "train_runtime": 3.0},
    ]
    (tmp_path / "run" / "log.jsonl").write_text("".join(json.dumps(log) + "\n" for log in logs) + '{"step": 9, "lo')
    return tmp_path / "run"


def dry_run(capsys, *arguments: str) -> str:
    assert command(["push", *arguments, "--dry-run"]) == 0
    return capsys.readouterr().out


def test_recipe_and_last_log(run, capsys):
    card = dry_run(capsys, str(run / "adapter"), "user/adapter", *BASE)
    training = card.partition("## Training")[2].partition("\n## ")[0]
    assert "Data: `org/texts`, `plays`." in training
    recipe = yaml.safe_load(training.partition("```yaml\n")[2].partition("```")[0])
    assert recipe["training"] == {"objective": "layerwise", "memory_size": 8, "max_steps": 8}
    assert recipe["model"]["name"] == "model" and "/home" not in card and str(run) not in card
    assert "at step 8: loss 0.25, layer_error 0.125, learning_rate 0.001" in training
    assert f"card by retention-gates {__version__}" in card and "## Licence" not in card
    assert "retained_mass" not in card and "uniform: the adapter has not been calibrated" in card


@pytest.mark.parametrize("change", [{"gate": {"gate_width": 32}}, {"model": {"name": "org/other"}}, {"data": []}])
def test_the_recipe_of_another_run_is_left_out(run, change, capsys):
    recipe = yaml.safe_load((run / "run.yaml").read_text())
    (run / "run.yaml").write_text(yaml.safe_dump(recipe | change))
    assert "## Training" not in dry_run(capsys, str(run / "adapter"), "user/adapter", *BASE)


def test_an_evaluation_is_that_of_the_adapter(made, run, monkeypatch, capsys):
    pytest.importorskip("matplotlib")
    monkeypatch.setattr(
        "retention_gates.recipes.report.html_page.page", lambda header, models: ""
    )  # seconds of pictures
    output = run / "evaluation"
    arguments = ["--text", str(made.texts), "--memory-size", "8", "--length", "60", "--documents", "2"]
    assert command(["evaluate", "--adapter", str(run / "adapter"), *arguments, "--output", str(output)]) == 0
    report = (output / "report.md").read_text()
    capsys.readouterr()
    card = dry_run(capsys, str(run / "adapter"), "user/adapter", *BASE, "--evaluation", str(output))
    table = [line for line in report.splitlines() if line.startswith("|")]
    assert len(table) > 3 and all(line in card for line in table)
    assert "\n## Evaluation\n" in card and "\n### model: Text, 60 tokens\n" in card and str(run) not in card

    assert "### How to read this" in card and "model: `model`, adapter `adapter`;" in card and "`texts`" in card

    copy = run / "copy"
    shutil.copytree(run / "adapter", copy)
    assert command(["push", str(copy), "user/adapter", *BASE, "--evaluation", str(output), "--dry-run"]) == 2
    assert "run retention-gates evaluate --adapter" in capsys.readouterr().err


@pytest.mark.parametrize("header", ["{", "[]", '{"kind": "header"}\n{"title": "small"}', '{"kind": "header"}\n3'])
def test_an_evaluation_that_is_none(run, header, capsys):
    (run / "results.jsonl").write_text(header + "\n")
    (run / "report.md").write_text("# Report\n")
    push = ["push", str(run / "adapter"), "user/adapter", *BASE, "--evaluation", str(run), "--dry-run"]
    assert command(push) == 2
    assert "results.jsonl is not as this version of retention-gates evaluate writes it" in capsys.readouterr().err


def test_of_a_comparison_only_what_is_said_of_the_adapter(run):
    """Of models whose titles begin alike; paths that begin alike are shortened as well."""
    models = [{"title": "small", "model": "org/a", "adapter": str(run / "adapter")}]
    models.append({"title": "small: new", "model": str(run), "adapter": str(run / "other")})
    lines = [{"kind": "header", "text": str(run)}, *({"kind": "model", **model} for model in models)]
    (run / "results.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    report = ["# Title", "**small.** Good.", "", "**small: new.** Bad.", "", "## Facts", ""]
    report += [f"- {each['title']}: `{each['adapter']}` on `{run}`" for each in models] + ["- text: here", ""]
    report += [line for each in models for line in (f"## {each['title']}: Text", "", "|" + each["title"] + "|", "")]
    (run / "report.md").write_text("\n".join([*report, "## How to read this", "", "- So."]))
    text = report_of(run, run / "adapter", "user/adapter")
    start = "**small.** Good.\n\n## Facts\n\n- small: `adapter` on `run`\n- text: here\n\n"
    assert text == start + "## small: Text\n\n|small|\n\n## How to read this\n\n- So."
    assert "|small: new|" in report_of(run, run / "other", "user/adapter")


def test_calibrated_shares(run, capsys):
    config = json.loads((run / "adapter" / "adapter_config.json").read_text())
    config["budget_shares"] = [[1.0, 2.0], [3.0, 4.0], [5.0, 60.0], [7.0, 8.0]]
    (run / "adapter" / "adapter_config.json").write_text(json.dumps(config))
    card = dry_run(capsys, str(run / "adapter"), "user/adapter", *BASE, "--licence", "apache-2.0")
    assert (
        "calibrated for any memory size (retained mass per head, in tokens: least 1.0, median 5.0, most 60.0)" in card
    )
    assert "## Licence\n\napache-2.0" in card


def test_a_card_that_somebody_wrote_is_kept(run, capsys):
    (run / "adapter" / "README.md").write_text("---\nlanguage: en\ntags: [mine]\n---\n# My gates\n\nMade with care.\n")
    card = dry_run(capsys, str(run / "adapter"), "user/adapter", *BASE)
    _, head, body = card.split("---\n", 2)
    metadata = yaml.safe_load(head)
    assert body.strip() == "# My gates\n\nMade with care."
    assert metadata["language"] == "en" and metadata["base_model"] == "org/tiny"
    assert metadata["tags"][0] == "mine" and "kv-cache" in metadata["tags"] and metadata["library_name"] == "peft"
    assert command(["push", str(run / "adapter"), "user/a", *BASE, "--evaluation", str(run), "--dry-run"]) == 2
    assert "was written by somebody" in capsys.readouterr().err


@pytest.mark.parametrize("head", ["a: [", "- a"])
def test_metadata_that_are_none(head):
    with pytest.raises(ValueError, match="The metadata of README.md"):
        with_metadata(f"---\n{head}\n---\n# Gates\n", CardFacts("user/adapter", "org/tiny"))


def test_how_to_load_is_python_that_parses(run):
    card = model_card(run / "adapter", CardFacts("user/adapter", "org/tiny", revision="v1"))
    code = card.partition("```python\n")[2].partition("```")[0]
    compile(code, "card", "exec")
    assert 'PeftModel.from_pretrained(base, "user/adapter", revision="v1")' in code
    assert "--adapter user/adapter@v1" in card
