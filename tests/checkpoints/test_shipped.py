"""The adapters that come with the repository: found by their base model, whole, small, and calibrated."""

import json
import shutil

import pytest
from tiny_adapter import make_files

from retention_gates import RetentionGateConfig
from retention_gates.checkpoints.shipped import shipped_adapter, shipped_adapters
from retention_gates.gates.adapter.files import CONFIG_NAME, WEIGHTS_NAME

MOST_BYTES = 4_000_000


@pytest.mark.parametrize("base_model, folder", shipped_adapters().items())
def test_shipped_adapters_are_whole(base_model, folder):
    config = RetentionGateConfig.from_pretrained(folder)  # compares shapes and the digest
    assert config.base_model_name_or_path == base_model
    assert (folder / WEIGHTS_NAME).stat().st_size <= MOST_BYTES
    assert [len(row) for row in config.budget_shares] == [config.num_key_value_heads] * len(config.gated_layers)
    card = (folder / "README.md").read_text(encoding="utf-8")
    assert f"base_model: {base_model}" in card and config.weights_sha256 in card


def test_an_adapter_is_found_by_its_base(tmp_path):
    adapter = make_files(tmp_path / "made").adapter
    shutil.copytree(adapter, tmp_path / "shipped" / "tiny")
    base_model = json.loads((adapter / CONFIG_NAME).read_text())["base_model_name_or_path"]
    assert shipped_adapter(base_model, tmp_path / "shipped") == tmp_path / "shipped" / "tiny"
    with pytest.raises(ValueError, match=f"No gates for 'org/other' .* There are some for {base_model}"):
        shipped_adapter("org/other", tmp_path / "shipped")


def test_an_installation_without_weights_says_so(tmp_path):
    adapter = make_files(tmp_path / "made").adapter
    shutil.copytree(adapter, tmp_path / "shipped" / "tiny", ignore=shutil.ignore_patterns(WEIGHTS_NAME))
    with pytest.raises(ValueError, match="shipped has none: they are in the repository"):
        shipped_adapter("org/tiny", tmp_path / "shipped")
