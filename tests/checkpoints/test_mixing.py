"""Gates with other things on the same base: a LoRA, other gates, weights that were quantised."""

import copy

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from tiny_gguf import SIZES, write_gguf
from tiny_models import tiny_model

from retention_gates import BoundedCache, RetentionGateConfig, find_gated_model
from retention_gates.recipes.loading.models import load_base

IDS = torch.randint(3, 97, (2, 20), generator=torch.Generator().manual_seed(1))


def randomize(model, seed):
    torch.manual_seed(seed)
    for parameter in model.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.3)
    return model.eval()


def save_gates(folder, seed, **config):
    config = RetentionGateConfig(**({"gate_width": 8, "initial_half_life": 5.0} | config))
    randomize(get_peft_model(tiny_model(), config), seed).save_pretrained(folder)
    return folder


@pytest.fixture
def lora(tmp_path):
    config = LoraConfig(r=4, target_modules=["q_proj", "v_proj", "gate_proj"], task_type="CAUSAL_LM")
    randomize(get_peft_model(tiny_model(), config), 2).save_pretrained(tmp_path / "lora")
    return tmp_path / "lora"


def generate(model) -> torch.Tensor:
    cache = BoundedCache(model, 8)
    return model.generate(input_ids=IDS, past_key_values=cache, max_new_tokens=12, do_sample=False)


@torch.no_grad()
def test_gates_on_a_merged_lora(lora, tmp_path):
    expected = PeftModel.from_pretrained(tiny_model(), lora)(IDS).logits
    merged = PeftModel.from_pretrained(tiny_model(), lora).merge_and_unload()
    model = PeftModel.from_pretrained(merged, save_gates(tmp_path / "gates", 1)).eval()
    with model.disable_adapter():
        torch.testing.assert_close(model(IDS).logits, expected, rtol=1e-4, atol=1e-4)
    assert not torch.equal(generate(model), generate(PeftModel.from_pretrained(tiny_model(), tmp_path / "gates")))


def test_gates_beside_a_lora(lora, tmp_path):
    """The LoRA first, then the gates on its base; the gates' own switch, file and end leave the LoRA alone."""
    gates = save_gates(tmp_path / "gates", 1)
    merged = PeftModel.from_pretrained(PeftModel.from_pretrained(tiny_model(), lora).merge_and_unload(), gates).eval()
    with_lora = PeftModel.from_pretrained(tiny_model(), lora)
    lora_alone = with_lora(IDS).logits
    model = PeftModel.from_pretrained(with_lora.get_base_model(), gates).eval()
    gated = model(IDS, use_cache=False).logits
    torch.testing.assert_close(gated, merged(IDS, use_cache=False).logits, rtol=1e-4, atol=1e-4)
    assert torch.equal(generate(model), generate(merged))
    with model.disable_adapter():
        assert torch.equal(model(IDS).logits, lora_alone)
    assert torch.equal(model(IDS, use_cache=False).logits, gated)
    assert list(model.peft_config) == ["default"] and with_lora.peft_config["default"].peft_type == "LORA"

    model.save_pretrained(tmp_path / "again")
    saved, before = (load_file(folder / "adapter_model.safetensors") for folder in (tmp_path / "again", gates))
    assert saved.keys() == before.keys() and all(torch.equal(saved[key], before[key]) for key in saved)
    assert torch.equal(model.unload()(IDS).logits, lora_alone)


def test_gates_learn_beside_a_frozen_lora(lora):
    base = PeftModel.from_pretrained(tiny_model(), lora).get_base_model()
    model = get_peft_model(base, RetentionGateConfig(gate_width=8, initial_half_life=5.0))
    model(IDS, use_cache=False).logits.square().mean().backward()
    trained = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert trained and all(".retention_gate." in name for name in trained)


def test_one_peft_model_takes_one_method(lora, tmp_path):
    model = PeftModel.from_pretrained(tiny_model(), save_gates(tmp_path / "gates", 1))
    with pytest.raises(ValueError, match="Cannot combine adapters with different peft types"):
        model.load_adapter(lora, "lora")


@torch.no_grad()
def test_several_gates_switched_between_requests(tmp_path):
    kinds = {"story": {}, "code": {"gate_type": "tied_mlp"}, "chat": {"layers_to_transform": [1, 3]}}
    folders = {name: save_gates(tmp_path / name, seed, **kind) for seed, (name, kind) in enumerate(kinds.items())}
    alone = {name: generate(PeftModel.from_pretrained(tiny_model(), folder)) for name, folder in folders.items()}
    assert len({tuple(ids.flatten().tolist()) for ids in alone.values()}) == 3
    model = PeftModel.from_pretrained(tiny_model(), folders["story"], adapter_name="story")
    for name in ("code", "chat"):
        model.load_adapter(folders[name], name)
    for name in ("code", "story", "chat", "chat", "story", "code"):
        model.set_adapter(name)
        assert torch.equal(generate(model), alone[name]), name
    with model.disable_adapter():
        assert torch.equal(model(IDS).logits, tiny_model()(IDS).logits)


def test_gates_on_a_base_out_of_4_bit_blocks(tmp_path):
    name = write_gguf(tmp_path, tiny_model(**SIZES))
    base = load_base(str(tmp_path), gguf_file=name, device="cpu")
    plain = copy.deepcopy(base)
    kept = tiny_model(**SIZES).state_dict()["model.layers.0.mlp.up_proj.weight"]
    got = base.state_dict()["model.layers.0.mlp.up_proj.weight"]
    assert 0 < (got - kept).abs().max() < 0.1  # it did go through 4 bits

    model = get_peft_model(base, RetentionGateConfig(gate_width=8, initial_half_life=5.0))
    model(IDS.clamp(max=95), use_cache=False).logits.square().mean().backward()
    gates = [p for layer in find_gated_model(model).gated_layers for p in layer.active_gate.parameters()]
    assert all(p.dtype == torch.float32 and p.grad.abs().sum() > 0 for p in gates)
    randomize(model, 1).save_pretrained(tmp_path / "gates")
    with model.disable_adapter():
        assert torch.equal(model(IDS.clamp(max=95)).logits, plain(IDS.clamp(max=95)).logits)
    again = PeftModel.from_pretrained(load_base(str(tmp_path), gguf_file=name, device="cpu"), tmp_path / "gates")
    with torch.no_grad():
        torch.testing.assert_close(
            again.eval()(IDS.clamp(max=95), use_cache=False).logits, model(IDS.clamp(max=95), use_cache=False).logits
        )
