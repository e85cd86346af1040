"""GGUF weights are converted once; a file that was touched is converted again if, and only if, its content changed."""

import json
import os
import shutil
import subprocess
import sys
import warnings

import pytest
import torch
from peft import PeftModel, get_peft_model
from tiny_gguf import SIZES, write_gguf
from tiny_models import tiny_model

from retention_gates import RetentionGateConfig
from retention_gates.gates.adapter.base_identity import BaseMismatchWarning, rounding
from retention_gates.recipes.loading import gguf_conversion, models
from retention_gates.recipes.loading.models import load_base, load_base_config, load_tokenizer


@pytest.fixture
def assets(tmp_path_factory, monkeypatch):
    folder = tmp_path_factory.mktemp("assets")
    monkeypatch.setattr(gguf_conversion.constants, "HF_ASSETS_CACHE", str(folder))
    return folder


@pytest.fixture
def conversions(monkeypatch):
    """The files that were converted."""
    found, convert = [], models._convert
    monkeypatch.setattr(models, "_convert", lambda *given: found.append(given[1]) or convert(*given))
    return found


def load(folder, **options):
    return load_base(str(folder), gguf_file="tiny.gguf", device="cpu", **options)


def entries(folder):
    return sorted(path.name for path in folder.iterdir() if not path.name.endswith(".lock"))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_second_start_converts_nothing_and_gives_the_same_bits(tmp_path, conversions, dtype, monkeypatch):
    write_gguf(tmp_path, tiny_model(**SIZES), with_tokenizer=True)
    plain, words = models._convert(
        str(tmp_path), "tiny.gguf", str(tmp_path / "tiny.gguf"), getattr(torch, dtype), {"trust_remote_code": False}
    )
    conversions.clear()
    first = load(tmp_path, dtype=dtype)
    assert conversions == ["tiny.gguf"] and entries(tmp_path) == ["tiny.gguf", f"tiny.gguf.{dtype}"]
    monkeypatch.setattr(models, "find_spec", lambda name: None)  # nor is gguf needed
    again = load(tmp_path, dtype=dtype)
    assert len(conversions) == 1
    for model in (first, again):
        assert model.state_dict().keys() == plain.state_dict().keys()
        assert all(torch.equal(tensor, plain.state_dict()[name]) for name, tensor in model.state_dict().items())
        assert model.name_or_path == model.config.name_or_path == str(tmp_path)
        assert next(model.parameters()).dtype == getattr(torch, dtype) and not model.training
    assert load_base_config(str(tmp_path), "tiny.gguf").hidden_size == 64
    tokenizer = load_tokenizer(str(tmp_path), gguf_file="tiny.gguf")
    text = "ab,cab<|end|>"
    assert tokenizer(text).input_ids == words(text).input_ids and tokenizer.eos_token == words.eos_token


def test_each_type_is_kept_on_its_own(tmp_path, conversions):
    write_gguf(tmp_path, tiny_model(**SIZES))
    for dtype in ("float32", "bfloat16", "float32", "bfloat16"):
        load(tmp_path, dtype=dtype)
    assert len(conversions) == 2


def test_another_content_is_converted_anew_and_a_touched_or_copied_file_is_not(tmp_path, conversions):
    here = tmp_path / "here"
    here.mkdir()
    write_gguf(here, tiny_model(**SIZES))
    before = load(here).state_dict()
    os.utime(here / "tiny.gguf")
    load(here)
    noted = json.loads((here / "tiny.gguf.float32" / gguf_conversion.SOURCE).read_text())
    assert noted["stat"] == gguf_conversion._stat(here / "tiny.gguf")  # no hash is needed next time
    there = tmp_path / "there"
    shutil.copytree(here, there)
    load(there)
    assert len(conversions) == 1
    times = (here / "tiny.gguf").stat()
    other = tiny_model(**SIZES)
    other.lm_head.weight.data.mul_(2)
    write_gguf(here, other)
    os.utime(here / "tiny.gguf", ns=(times.st_atime_ns, times.st_mtime_ns))  # as a copy by rsync may look
    assert (here / "tiny.gguf").stat().st_size == times.st_size
    after = load(here).state_dict()
    assert len(conversions) == 2
    assert any(not torch.equal(after[name], tensor) for name, tensor in before.items())


@pytest.mark.parametrize("damage", ["", "{", "[]", "3", '{"form": 1}', '{"form": 0, "stat": [], "sha256": ""}'])
def test_a_folder_that_is_not_of_this_version_is_converted_anew(tmp_path, conversions, damage):
    write_gguf(tmp_path, tiny_model(**SIZES))
    load(tmp_path)
    (tmp_path / "tiny.gguf.float32" / gguf_conversion.SOURCE).write_text(damage)
    load(tmp_path)
    assert len(conversions) == 2


def test_a_file_that_pip_or_the_hub_looks_after_gets_no_neighbour(tmp_path, assets, conversions):
    folder = tmp_path / "site-packages" / "a_model"
    folder.mkdir(parents=True)
    write_gguf(folder, tiny_model(**SIZES))
    load(folder)
    load(folder)
    assert len(conversions) == 1 and entries(folder) == ["tiny.gguf"]
    assert [path.parent.name for path in assets.rglob("config.json")] == ["tiny.gguf.float32"]


def test_without_room_the_model_is_loaded_all_the_same_and_nothing_is_left(tmp_path, monkeypatch):
    write_gguf(tmp_path, tiny_model(**SIZES))
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(gguf_conversion.shutil, "disk_usage", lambda path: usage._replace(free=1000))
    with pytest.warns(UserWarning, match=r"cannot be kept in .*tiny.gguf.float32 .*GB are needed.*HF_ASSETS_CACHE"):
        model = load(tmp_path)
    assert entries(tmp_path) == ["tiny.gguf"] and rounding(model) == "Q4_1"


def test_a_conversion_that_fails_leaves_nothing(tmp_path, monkeypatch):
    write_gguf(tmp_path, tiny_model(**SIZES))

    def fail(*_):
        raise RuntimeError("killed")

    monkeypatch.setattr(gguf_conversion, "_note", fail)
    with pytest.raises(RuntimeError, match="killed"):
        load(tmp_path)
    assert entries(tmp_path) == ["tiny.gguf"]


def test_a_file_that_changes_meanwhile_is_refused(tmp_path, monkeypatch):
    write_gguf(tmp_path, tiny_model(**SIZES))
    convert = models._convert

    def slowly(*given):
        os.utime(tmp_path / "tiny.gguf")
        return convert(*given)

    monkeypatch.setattr(models, "_convert", slowly)
    with pytest.raises(ValueError, match=r"tiny.gguf changed while it was read"):
        load(tmp_path)
    assert entries(tmp_path) == ["tiny.gguf"]


@pytest.mark.slow
def test_processes_that_start_together_convert_once(tmp_path):
    write_gguf(tmp_path, tiny_model(**SIZES))
    code = (
        "from retention_gates.recipes.loading.models import load_base; "
        f"m = load_base({str(tmp_path)!r}, gguf_file='tiny.gguf', device='cpu'); "
        "print(sum(float(p.double().sum()) for p in m.parameters()))"
    )
    started = [
        subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for _ in range(3)
    ]
    printed = [process.communicate(timeout=300) for process in started]
    assert len({out for out, _ in printed}) == 1 and printed[0][0].strip()
    assert sum("is converted once" in err for _, err in printed) == 1
    assert entries(tmp_path) == ["tiny.gguf", "tiny.gguf.float32"]


def test_gates_for_one_rounding_warn_on_another_and_no_other_size_takes_them(tmp_path):
    whole = tiny_model(**SIZES).eval()
    whole.name_or_path = str(tmp_path)
    write_gguf(tmp_path, whole)
    rounded = load(tmp_path)
    assert (rounding(whole), rounding(rounded)) == ("none", "Q4_1")
    for base, name in ((whole, "whole"), (rounded, "rounded")):
        get_peft_model(base, RetentionGateConfig(gate_width=8)).save_pretrained(tmp_path / name)
        base.name_or_path = str(tmp_path)
    assert RetentionGateConfig.from_pretrained(str(tmp_path / "rounded")).base_rounding == "Q4_1"

    def fresh(is_rounded):
        model = load(tmp_path) if is_rounded else tiny_model(**SIZES)
        model.name_or_path = str(tmp_path)
        return model

    with pytest.warns(BaseMismatchWarning, match="on whole weights, .* has weights rounded to Q4_1: hidden"):
        PeftModel.from_pretrained(fresh(True), tmp_path / "whole")
    with pytest.warns(BaseMismatchWarning, match="on weights rounded to Q4_1, .* has whole weights: hidden"):
        PeftModel.from_pretrained(fresh(False), tmp_path / "rounded")
    with warnings.catch_warnings():
        warnings.simplefilter("error", BaseMismatchWarning)
        PeftModel.from_pretrained(fresh(True), tmp_path / "rounded")
        PeftModel.from_pretrained(fresh(False), tmp_path / "whole")
    with pytest.raises(ValueError, match="made for a base model with hidden_size = 64, but this one has 32"):
        PeftModel.from_pretrained(tiny_model(), tmp_path / "rounded")
