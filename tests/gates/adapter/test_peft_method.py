"""Adapters come and go as PEFT users expect, and wrong ones are refused."""

import json
import math

import numpy as np
import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from tiny_models import tiny_model
from transformers import DynamicCache

from retention_gates import RetentionGateConfig, find_gated_model, record
from retention_gates.gates.adapter.gate import GATES, half_life, half_life_to_bias
from retention_gates.gates.attention.documents import document_ids_from, document_offsets

IDS = torch.randint(3, 97, (2, 20), generator=torch.Generator().manual_seed(1))


def gated(**config) -> PeftModel:
    return get_peft_model(
        tiny_model(), RetentionGateConfig(**({"gate_width": 8, "initial_half_life": 4.0} | config))
    ).eval()


@pytest.fixture
def adapter(tmp_path):
    model = gated()
    model.save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


@torch.no_grad()
def test_two_adapters_delete_and_unload():
    base = tiny_model()
    expected = base(IDS).logits
    model = gated()
    first = model(IDS, use_cache=False).logits
    model.add_adapter("second", RetentionGateConfig(gate_type="linear", initial_half_life=50.0, protected_tokens=0))
    assert torch.equal(model(IDS, use_cache=False).logits, first)
    model.set_adapter("second")
    assert not torch.equal(model(IDS, use_cache=False).logits, first)
    with record(model) as recording:
        model(IDS, use_cache=False)
    assert (recording.log_beta[0] < 0).all()  # the second adapter protects nothing
    model.set_adapter("default")
    assert torch.equal(model(IDS, use_cache=False).logits, first)
    model.delete_adapter("second")
    assert torch.equal(model(IDS, use_cache=False).logits, first)
    unloaded = model.unload()
    assert type(unloaded) is type(base) and unloaded.config._attn_implementation == base.config._attn_implementation
    assert torch.equal(unloaded(IDS).logits, expected)


@torch.no_grad()
def test_adapters_that_come_while_the_gates_are_off_leave_the_base_alone(adapter):
    mask = torch.ones_like(IDS)
    mask[0, :6] = 0
    for implementation in ("sdpa", "eager"):
        base = tiny_model()
        base.set_attn_implementation(implementation)
        expected = base(IDS, attention_mask=mask).logits
        model = get_peft_model(base, RetentionGateConfig(gate_width=8, initial_half_life=4.0)).eval()
        on = model(IDS, use_cache=False).logits
        with model.disable_adapter():
            model.add_adapter("b", RetentionGateConfig(gate_width=8, layers_to_transform=[1]))
            model.set_adapter("b")
            model.load_adapter(adapter, "c")
            assert torch.equal(model(IDS, attention_mask=mask).logits, expected)
        model.set_adapter("default")
        assert torch.equal(model(IDS, use_cache=False).logits, on)
        with pytest.raises(ValueError, match=r"model.unload\(\)"):
            model.merge_and_unload()


@torch.no_grad()
def test_a_second_copy_of_an_adapter_and_another_name(adapter):
    model = PeftModel.from_pretrained(tiny_model(), adapter, adapter_name="code").eval()
    first = model(IDS, use_cache=False).logits
    model.load_adapter(adapter, "copy")
    model.set_adapter("copy")
    assert torch.equal(model(IDS, use_cache=False).logits, first)
    assert all(".retention_gate.hidden" in k or ".retention_gate.output" in k for k in load_file(adapter / WEIGHTS))


@torch.no_grad()
def test_many_layers_save_and_load(tmp_path):
    """PEFT treats twenty target modules and more in a way of its own."""
    deep = {"num_hidden_layers": 24}
    model = get_peft_model(
        tiny_model(**deep), RetentionGateConfig(gate_width=2, layers_to_transform=list(range(1, 24)))
    )
    assert len(find_gated_model(model).gated_layers) == 23
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(tiny_model(**deep), tmp_path)
    assert again.peft_config["default"].target_modules == model.peft_config["default"].target_modules
    torch.testing.assert_close(again(IDS, use_cache=False).logits, model(IDS, use_cache=False).logits)


@torch.no_grad()
def test_chosen_layers_only():
    model = gated(layers_to_transform=[1, 3])
    assert [layer.base_layer.layer_idx for layer in find_gated_model(model).gated_layers] == [1, 3]
    with pytest.raises(ValueError, match=r"Layers \[7\] .* \[0, 1, 2, 3\]"):
        gated(layers_to_transform=[1, 7])


@torch.no_grad()
def test_half_life_is_what_was_asked_for():
    for kind in GATES:
        config = RetentionGateConfig(gate_type=kind, initial_half_life=2000.0)
        log_beta = GATES[kind](32, 2, config)(torch.zeros(1, 3, 32))
        assert log_beta.shape == (1, 2, 3) and log_beta.dtype == torch.float32
        torch.testing.assert_close(half_life(log_beta[0, 0, 0]).item(), 2000.0, rtol=0.1, atol=0)
    assert half_life_to_bias(math.log(2) * math.exp(18)) == pytest.approx(18)


def test_documents_from_masks_and_positions():
    mask = torch.tensor([[0, 0, 1, 1], [1, 1, 1, 0]])
    assert document_ids_from(mask, None, 2).tolist() == [[-1, -1, 0, 0], [0, 0, 0, -1]]
    ids = document_ids_from(None, torch.tensor([[0, 1, 0, 1, 2, 0]]), 1)
    assert ids.tolist() == [[0, 0, 1, 1, 1, 2]]
    assert document_offsets(ids).tolist() == [[0, 1, 0, 1, 2, 0]]
    assert document_offsets(torch.tensor([[-1, -1, 0, 0, 0]]))[0, 2:].tolist() == [0, 1, 2]
    assert document_ids_from(None, None, 2) is None
    with pytest.raises(ValueError, match="2-D padding mask"):
        document_ids_from(torch.ones(1, 1, 4, 4), None, 1)


@torch.no_grad()
def test_a_plain_cache_evicts_nothing():
    model = gated()
    with model.disable_adapter():
        expected = model(IDS).logits
    model.base_model.gated_layers[0].base_layer.config  # noqa: B018 - the wrapper forwards attributes
    mask = torch.ones_like(IDS)
    mask[0, :5] = 0
    with model.disable_adapter():
        padded = model(IDS, attention_mask=mask).logits
    assert torch.equal(model(IDS, past_key_values=DynamicCache()).logits, expected)
    torch.testing.assert_close(model(IDS, attention_mask=mask).logits[mask.bool()], padded[mask.bool()])
    cache = DynamicCache(config=model.config)
    model(IDS[:, :12], past_key_values=cache)
    torch.testing.assert_close(
        model(IDS[:, 12:], past_key_values=cache).logits, expected[:, 12:], rtol=1e-4, atol=1e-4
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"gate_type": "mpl"}, "gate_type='mpl'"),
        ({"activation": "silou"}, "Did you mean 'silu'"),
        ({"gate_width": 0}, "gate_width=0"),
        ({"gate_width": 2.5}, "gate_width=2.5"),
        ({"gate_width": np.int64(8)}, "must be an integer .* as a Python int"),
        ({"activation": ["silu"]}, "activation=.'silu'. is not an activation"),
        ({"initial_half_life": "5"}, "initial_half_life='5'"),
        ({"initial_half_life": -1.0}, "initial_half_life=-1.0"),
        ({"initial_half_life": math.nan}, "initial_half_life=nan"),
        ({"initial_half_life": math.inf}, "finite"),
        ({"protected_tokens": -1}, "protected_tokens=-1"),
        ({"protected_tokens": True}, "protected_tokens=True"),
        ({"layers_to_transform": [-1]}, "layers_to_transform=-1"),
        ({"layers_to_transform": 2.0}, "layers_to_transform=2.0 must be a list"),
        ({"layers_to_transform": "all"}, "layers_to_transform='all' must be a list"),
        ({"budget_shares": [1.0, 2.0]}, "must be a list of lists"),
        ({"budget_shares": "even"}, "budget_shares='even' must be a list of lists"),
        ({"modules_to_save": ["lm_head"]}, "stays frozen"),
    ],
)
def test_config_refuses(options, message):
    with pytest.raises(ValueError, match=message):
        RetentionGateConfig(**options)


WEIGHTS = "adapter_model.safetensors"


def _config(adapter, **changes):
    path = adapter / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def _weights(adapter, change):
    tensors = load_file(adapter / WEIGHTS)
    change(tensors)
    save_file(tensors, adapter / WEIGHTS)


FIRST = "base_model.model.model.layers.0.self_attn.retention_gate.output.bias"


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda a: _config(a, half_life_schedule="cosine"), "half_life_schedule.*newer version"),
        (lambda a: _config(a, gate_widht=8), "nearest known: 'gate_width'"),
        (lambda a: _config(a, budget_shares=[[1.0, 2.0]]), "budget_shares must be .* take them out"),
        (lambda a: _config(a, hidden_size="32"), "hidden_size='32' must be an integer"),
        (lambda a: _config(a, initial_half_life=math.nan), "initial_half_life=nan"),
        (lambda a: _weights(a, lambda t: t.pop(FIRST)), f"missing .*{FIRST.split('.')[-1]}"),
        (lambda a: _weights(a, lambda t: t.update(extra=torch.zeros(1))), "unexpected extra"),
        (lambda a: _weights(a, lambda t: t[FIRST].fill_(math.nan)), "NaN"),
        (lambda a: _weights(a, lambda t: t.update({FIRST: torch.zeros(3)})), r"shape \[3\], not \[2\]"),
        (lambda a: _weights(a, lambda t: t.update({FIRST: torch.zeros(2, dtype=torch.int32)})), "not floating"),
        (lambda a: (a / WEIGHTS).write_bytes((a / WEIGHTS).read_bytes()[:-7]), "not a whole safetensors"),
        (lambda a: (a / WEIGHTS).write_bytes(b"not tensors"), "not a whole safetensors"),
    ],
)
def test_a_damaged_adapter_is_refused(adapter, damage, message):
    damage(adapter)
    with pytest.raises(ValueError, match=message):
        PeftModel.from_pretrained(tiny_model(), adapter)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"{not json", r"adapter_config.json is not JSON \(Expecting"),
        (b"", "is not JSON"),
        (b"\xff\xfe\x00", "is not JSON .*0xff"),
        (b"[1, 2]", "holds a list, not an object"),
        (b"{}", "peft_type=None, where retention gates have 'RETENTION_GATE'"),
        (b'{"peft_type": "LORA", "r": 8}', "peft_type='LORA'"),
    ],
)
def test_a_config_that_is_none_of_ours_is_refused(adapter, content, message):
    (adapter / "adapter_config.json").write_bytes(content)
    with pytest.raises(ValueError, match=message):
        RetentionGateConfig.from_pretrained(adapter)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_hidden_layers": 5}, "gated_layers"),
        ({"num_hidden_layers": 3}, r"Layers \[3\]"),
        ({"num_key_value_heads": 4}, "num_key_value_heads = 2, but this one has 4"),
        ({"hidden_size": 48}, "hidden_size = 32, but this one has 48"),
    ],
)
def test_another_base_is_refused(adapter, changes, message):
    with pytest.raises(ValueError, match=message):
        PeftModel.from_pretrained(tiny_model(**changes), adapter)


def test_no_gates_and_ignored_gates_are_refused():
    with pytest.raises(ValueError, match="has no retention gates"):
        find_gated_model(tiny_model())
    model = gated()
    model.base_model.model.set_attn_implementation("eager")
    with pytest.raises(ValueError, match="after the gates were added"):
        model(IDS, use_cache=False)
