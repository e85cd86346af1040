"""What people do with adapters of PEFT's own methods, done with gates: it works, or it is refused before anything."""

import warnings

import pytest
import torch
from gated_models import gated_model
from peft import (
    LoraConfig,
    PeftModel,
    get_peft_model,
    get_peft_model_state_dict,
    inject_adapter_in_model,
    set_peft_model_state_dict,
)
from peft.utils.hotswap import hotswap_adapter
from safetensors.torch import load_file
from tiny_models import tiny_model
from transformers import AutoModelForCausalLM

from retention_gates import RetentionGateConfig, find_gated_model
from retention_gates.gates.adapter.gate import GATES

IDS = torch.randint(3, 96, (2, 20), generator=torch.Generator().manual_seed(1))
WEIGHTS = "adapter_model.safetensors"
ALONE = "Retention gates need PEFT's wrapper .* PeftModel.from_pretrained"


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A base model, and an adapter that names it."""
    folder = tmp_path_factory.mktemp("habits")
    tiny_model().save_pretrained(folder / "base")
    base = AutoModelForCausalLM.from_pretrained(folder / "base")
    get_peft_model(base, RetentionGateConfig(gate_width=8, initial_half_life=4.0)).save_pretrained(folder / "gates")
    return folder


def load_base(files):
    return AutoModelForCausalLM.from_pretrained(files / "base")


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(IDS, use_cache=False).logits


def gates_of(model) -> list[torch.nn.Parameter]:
    return [p for name, p in model.named_parameters() if ".retention_gate." in name]


def learning_in(model) -> set[str]:
    """Names of the adapters that have parameters which learn."""
    names = (name for name, p in model.named_parameters() if p.requires_grad)
    return {name.partition(".retention_gate.")[2].partition(".")[0] for name in names}


@pytest.mark.parametrize("asked", ["auto", True])
def test_a_resized_vocabulary_is_not_saved_with_the_gates(files, tmp_path, asked):
    base = load_base(files)
    base.resize_token_embeddings(120)
    model = get_peft_model(base, RetentionGateConfig(gate_width=8, initial_half_life=4.0))
    with pytest.warns(UserWarning, match="Only gates are saved, without .*embed_tokens.weight.* load the gates on it"):
        model.save_pretrained(tmp_path / "gates", save_embedding_layers=asked)
    assert all(".retention_gate." in key for key in load_file(tmp_path / "gates" / WEIGHTS))
    expected = logits(model)
    model.unload().save_pretrained(tmp_path / "base")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    assert torch.equal(logits(PeftModel.from_pretrained(again, tmp_path / "gates")), expected)


def test_what_a_lora_saves_whole_is_not_saved_with_the_gates(files, tmp_path):
    lora = get_peft_model(load_base(files), LoraConfig(target_modules=["q_proj"], modules_to_save=["lm_head"]))
    model = get_peft_model(lora.base_model.model, RetentionGateConfig(gate_width=8))
    with pytest.warns(UserWarning, match="Only gates are saved"):
        model.save_pretrained(tmp_path / "gates")
    PeftModel.from_pretrained(load_base(files), tmp_path / "gates")


def test_an_unchanged_base_is_saved_without_a_word(files, tmp_path):
    model = get_peft_model(load_base(files), RetentionGateConfig(gate_width=8))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.save_pretrained(tmp_path)


def test_layers_without_their_wrapper_are_refused(files):
    """transformers' own ways to load an adapter would leave the gates at random."""
    base = load_base(files)
    expected = logits(base)
    kinds = [type(module) for module in base.modules()]
    for put_in in (
        lambda: base.load_adapter(str(files / "gates")),
        lambda: base.load_adapter(str(files / "gates"), adapter_name="other", is_trainable=True),
        lambda: inject_adapter_in_model(RetentionGateConfig(gate_width=8), base),
        lambda: AutoModelForCausalLM.from_pretrained(files / "gates"),
    ):
        with pytest.raises(ValueError, match=ALONE):
            put_in()
    assert [type(module) for module in base.modules()] == kinds
    assert torch.equal(logits(base), expected)
    assert not torch.equal(logits(PeftModel.from_pretrained(base, files / "gates")), expected)  # the way it says


def test_hotswap_says_that_it_is_for_lora(files):
    model = PeftModel.from_pretrained(load_base(files), files / "gates")
    before = logits(model)
    with pytest.raises(ValueError, match="only supports LORA but RETENTION_GATE was passed"):
        hotswap_adapter(model, str(files / "gates"), "default")
    assert torch.equal(logits(model), before)


@pytest.mark.parametrize("trainable", [False, True])
@pytest.mark.parametrize("gate_type", list(GATES))
def test_weights_are_set_as_often_as_wanted(files, tmp_path, trainable, gate_type):
    """Averaged weights, and rounds of federated training."""
    config = RetentionGateConfig(gate_width=8, initial_half_life=4.0, gate_type=gate_type)
    get_peft_model(load_base(files), config).save_pretrained(tmp_path / "gates")
    model = PeftModel.from_pretrained(load_base(files), tmp_path / "gates", is_trainable=trainable)
    first, before = {k: t.clone() for k, t in get_peft_model_state_dict(model).items()}, logits(model)
    for factor in (0.5, 2.0, 1.0):
        wanted = {key: tensor * factor for key, tensor in first.items()}
        set_peft_model_state_dict(model, wanted)
        found = get_peft_model_state_dict(model)
        assert found.keys() == wanted.keys() and all(torch.equal(found[key], wanted[key]) for key in wanted)
        assert torch.equal(logits(model), before) == (factor == 1.0)
    with pytest.raises(ValueError, match="missing"):
        set_peft_model_state_dict(model, dict(list(first.items())[1:]))
    assert torch.equal(logits(model), before)
    if not trainable:
        with pytest.raises(ValueError, match="'default' is loaded already"):
            model.load_adapter(tmp_path / "gates", "default")
    model.save_pretrained(tmp_path / "again")
    assert torch.equal(logits(PeftModel.from_pretrained(load_base(files), tmp_path / "again")), before)


@pytest.mark.parametrize("gate_type", list(GATES))
def test_what_learns_is_what_learned_before_the_gates_were_off(files, gate_type):
    model = get_peft_model(load_base(files), RetentionGateConfig(gate_width=8, gate_type=gate_type))
    gates = gates_of(model)
    gates[0].requires_grad_(False)
    learned = [p.requires_grad for p in gates]
    assert learned == [False] + [True] * (len(gates) - 1)
    for _ in range(2):
        with model.disable_adapter():
            assert not any(p.requires_grad for p in gates)
            with model.disable_adapter():
                pass
        assert [p.requires_grad for p in gates] == learned
    for parameter in gates:
        parameter.requires_grad_(False)
    with model.disable_adapter():
        pass
    assert not any(p.requires_grad for p in gates)


def test_adapters_that_are_chosen_or_come_while_the_gates_are_off_learn_as_said(files):
    model = get_peft_model(load_base(files), RetentionGateConfig(gate_width=8))
    with model.disable_adapter():
        model.load_adapter(files / "gates", "learns", is_trainable=True)
        model.load_adapter(files / "gates", "rests")
    learning = {
        name.split(".retention_gate.")[1].split(".")[0] for name, p in model.named_parameters() if p.requires_grad
    }
    assert learning == {"default", "learns"}
    with model.disable_adapter():
        model.set_adapter("learns")
    learning = {
        name.split(".retention_gate.")[1].split(".")[0] for name, p in model.named_parameters() if p.requires_grad
    }
    assert learning == {"learns"}


def test_the_name_of_the_method_is_a_text_with_a_value():
    config = find_gated_model(gated_model()).active_config
    assert config.peft_type == config.peft_type.value == "RETENTION_GATE"
    assert f"{config.peft_type}" == "RETENTION_GATE" and config.to_dict()["peft_type"] == "RETENTION_GATE"
