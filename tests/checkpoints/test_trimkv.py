"""The authors' gates become adapters with the same log_beta, and ours take their form; what is not known is refused.

The files are synthetic: of the form that trimkv 0.1.5 writes, with random numbers.
"""

import json
import pickle
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file
from tiny_models import tiny_config, tiny_model
from transformers.activations import ACT2FN

from retention_gates import RetentionGateConfig, find_gated_model, record
from retention_gates.cli import main as command

FAMILIES = ("qwen3", "qwen2", "llama", "phi3")
WIDTH, HIDDEN, HEADS, LAYERS = 24, 32, 2, 4
KEY = "model.layers.{}.self_attn.retention_gate.{}"
IDS = torch.randint(3, 97, (2, 20), generator=torch.Generator().manual_seed(1))
FACTS = {"memory_size": 512, "global_capacity": True, "trainable_params": "retention_gate", "max_seq_len": 16384}


def tensors_of(kind: str, seed: int = 0) -> dict[str, torch.Tensor]:
    """The authors' tensors, as FACTS of the package name them."""
    generator = torch.Generator().manual_seed(seed)

    def random(*shape):
        return torch.randn(shape, generator=generator) / shape[-1] ** 0.5

    last = {"linear3.weight": random(HEADS, WIDTH), "bias": random(HEADS) + 4}
    tensors = {}
    for layer in range(LAYERS):
        gate = {"linear1.weight": random(WIDTH, HIDDEN), "linear1.bias": random(WIDTH)}
        if kind == "rg":
            gate |= {"linear2.weight": random(HEADS, WIDTH), "bias": random(HEADS) + 4}
        else:
            gate |= {"linear2.weight": random(WIDTH, WIDTH), "linear2.bias": random(WIDTH), **last}
        tensors |= {KEY.format(layer, name): tensor for name, tensor in gate.items()}
    return tensors


def write(folder: Path, kind: str, family: str = "qwen3", tensors=None, **changes) -> Path:
    folder.mkdir()
    config = json.loads(tiny_config(family).to_json_string(use_diff=False))
    facts = {"base_model": f"org/{family}", "retention_gate": kind, "retention_gate_intermediate_size": WIDTH}
    config = {k: v for k, v in (config | facts | FACTS | changes).items() if v is not ...}
    (folder / "config.json").write_text(json.dumps(config))
    torch.save(tensors_of(kind) if tensors is None else tensors, folder / "trimkv_weights.pth")
    return folder


def formula(tensors: dict[str, torch.Tensor], layer: int, x: torch.Tensor, act) -> torch.Tensor:
    """log_beta [B, T, H] = logsigmoid(last(act(... linear1(x))) + bias), in fp64."""
    gate = {key.split(".retention_gate.")[1]: t.double() for key, t in tensors.items() if f".{layer}." in key}
    x = act(F.linear(x.double(), gate["linear1.weight"], gate["linear1.bias"]))
    if "linear3.weight" in gate:
        x = act(F.linear(x, gate["linear2.weight"], gate["linear2.bias"]))
    return F.logsigmoid(F.linear(x, gate.get("linear3.weight", gate["linear2.weight"])) + gate["bias"])


@pytest.mark.parametrize("kind", ["rg", "rg10"])
@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_log_beta_is_that_of_the_formula(family, kind, tmp_path):
    source = write(tmp_path / "theirs", kind, family)
    assert command(["convert", str(source), str(tmp_path / "ours")]) == 0
    model = PeftModel.from_pretrained(tiny_model(family), tmp_path / "ours").eval()
    entering: dict[int, torch.Tensor] = {}
    for wrapper in find_gated_model(model).gated_layers:

        def note(module, args, kwargs, layer=wrapper.base_layer.layer_idx):
            entering[layer] = args[0] if args else kwargs["hidden_states"]

        wrapper.register_forward_pre_hook(note, with_kwargs=True)
    with record(model) as recording:
        model(IDS, use_cache=False)
    act = ACT2FN[tiny_config(family).hidden_act]
    assert len(recording.log_beta) == LAYERS
    for layer, log_beta in enumerate(recording.log_beta):
        expected = formula(tensors_of(kind), layer, entering[layer], act).transpose(1, 2)
        assert log_beta.shape == (2, HEADS, 20)
        torch.testing.assert_close(log_beta.double(), expected, rtol=1e-6, atol=1e-6)
    assert (recording.log_beta[0][..., :4] < 0).all()  # nothing is protected, as there


@pytest.mark.parametrize("kind", ["rg", "rg10"])
def test_there_and_back(kind, tmp_path):
    source = write(tmp_path / "theirs", kind)
    (tmp_path / "base").mkdir()
    tiny_config("qwen3").save_pretrained(tmp_path / "base")
    assert command(["convert", str(source), str(tmp_path / "ours"), "--base-model", str(tmp_path / "base")]) == 0
    back = ["convert", "--to", "trimkv", str(tmp_path / "ours"), str(tmp_path / "back"), "--memory-size", "512"]
    assert command([*back, "--global-capacity"]) == 0
    tensors = torch.load(tmp_path / "back" / "trimkv_weights.pth", weights_only=True)
    expected = tensors_of(kind)
    assert tensors.keys() == expected.keys() and all(torch.equal(tensors[key], expected[key]) for key in expected)
    config = json.loads((tmp_path / "back" / "config.json").read_text())
    base = json.loads((tmp_path / "base" / "config.json").read_text())
    facts = {k: v for k, v in FACTS.items() if k != "max_seq_len"}
    facts |= {"base_model": str(tmp_path / "base"), "retention_gate": kind, "retention_gate_intermediate_size": WIDTH}
    rope = {"rope_theta": base["rope_parameters"]["rope_theta"]}  # where transformers 4 looks for it
    assert config == base | facts | rope

    assert command(["convert", str(tmp_path / "back"), str(tmp_path / "again")]) == 0
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        assert (tmp_path / "again" / name).read_bytes() == (tmp_path / "ours" / name).read_bytes()


def test_the_card_tells_what_the_file_said_of_its_use(tmp_path):
    source = write(tmp_path / "theirs", "rg10", retention_gate_bias_init=18.0, memory_size=128, global_capacity=False)
    assert command(["convert", str(source), str(tmp_path / "ours")]) == 0
    card = (tmp_path / "ours" / "README.md").read_text()
    assert (
        "| memory_size | 128 |" in card
        and "| global_capacity | False |" in card
        and "| retention_gate | rg10 |" in card
    )
    assert str(tmp_path) not in card
    config = RetentionGateConfig.from_pretrained(str(tmp_path / "ours"))
    assert config.base_model_name_or_path == "org/qwen3" and config.protected_tokens == 0
    assert config.initial_half_life == pytest.approx(4.55e7, rel=1e-3)

    without = write(tmp_path / "silent", "rg", memory_size=..., global_capacity=...)
    assert command(["convert", str(without), str(tmp_path / "quiet")]) == 0
    card = (tmp_path / "quiet" / "README.md").read_text()
    assert "memory_size" not in card and "global_capacity" not in card


def changed(kind="rg", drop=(), **tensors):
    mine = {key: tensor for key, tensor in tensors_of(kind).items() if not key.endswith(tuple(drop) or "?")}
    return mine | {KEY.format(1, name.replace("__", ".")): tensor for name, tensor in tensors.items()}


class RunsCode:
    def __reduce__(self):
        return (open, ("canary", "w"))


REFUSALS = {
    "unknown gate": ({"kind": "rg7"}, "retention_gate='rg7', of which nothing is known here; known are rg, rg10"),
    "no gate": ({"kind": None}, "retention_gate=None"),
    "another family": ({"model_type": "qwen3_vl"}, "family is 'qwen3_vl'; their form is known of qwen3, qwen2"),
    "missing key": ({"tensors": changed(drop=("2.self_attn.retention_gate.bias",))}, "missing model.layers.2"),
    "more layers": ({"num_hidden_layers": 5}, "missing model.layers.4"),
    "fewer layers": ({"num_hidden_layers": 3}, "unexpected model.layers.3"),
    "extra key": ({"tensors": changed(linear2__bias=torch.zeros(2))}, "unexpected model.layers.1"),
    "rg keys in rg10": ({"kind": "rg10", "tensors": tensors_of("rg")}, "missing model.layers.0"),
    "width": ({"retention_gate_intermediate_size": 25}, r"has shape [24], not [25]"),
    "other base": ({"hidden_size": 48}, r"has shape [24, 32], not [24, 48]"),
    "other heads": ({"num_key_value_heads": 4}, "has shape [2], not [4]"),
    "not tied": ({"kind": "rg10", "tensors": changed("rg10", bias=torch.zeros(2))}, "bias differs between layers"),
    "not finite": ({"tensors": changed(bias=torch.full((2,), torch.inf))}, "NaN or infinite"),
    "integers": ({"tensors": changed(bias=torch.zeros(2, dtype=torch.int64))}, "is torch.int64"),
    "no width": ({"retention_gate_intermediate_size": ...}, "retention_gate_intermediate_size=None"),
    "no base": ({"base_model": ...}, "names no base_model"),
    "no activation": ({"hidden_act": "swiglu"}, "activation='swiglu'"),
    "a bias of text": ({"retention_gate_bias_init": "18"}, "retention_gate_bias_init='18'"),
    "a list": ({"tensors": [torch.zeros(1)]}, "is no dict of tensors"),
    "code": ({"tensors": {"a": RunsCode()}}, "Nothing of it was run"),
}  # fmt: skip


@pytest.mark.parametrize("case", list(REFUSALS))
def test_what_is_refused(case, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    changes, message = REFUSALS[case]
    source = write(tmp_path / "theirs", **({"kind": "rg"} | changes))
    assert command(["convert", str(source), "out/ours"]) == 2
    printed = capsys.readouterr()
    assert message in printed.err and printed.err.count("\n") == 1, printed.err
    assert not (tmp_path / "canary").exists() and not list(tmp_path.glob("out/*"))


def test_files_that_are_none(tmp_path, capsys):
    source = write(tmp_path / "theirs", "rg")
    weights = source / "trimkv_weights.pth"
    whole = weights.read_bytes()
    for content in (whole[:-200], b"", b"not tensors", pickle.dumps(RunsCode())):
        weights.write_bytes(content)
        assert command(["convert", str(source), str(tmp_path / "ours")]) == 2
        assert "Nothing of it was run" in capsys.readouterr().err
    weights.unlink()
    assert command(["convert", str(source), str(tmp_path / "ours")]) == 2
    assert "has no trimkv_weights.pth (found: config.json)" in capsys.readouterr().err
    weights.write_bytes(whole)
    (tmp_path / "thesis.txt").write_text("years of work")
    for target in (tmp_path, tmp_path / "thesis.txt"):
        assert command(["convert", str(source), str(target)]) == 2
        assert "exists: name a new folder" in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["theirs", "thesis.txt"]


@pytest.mark.parametrize(
    ("options", "arguments", "message"),
    [
        ({"gate_type": "linear"}, [], "no 'linear' gate"),
        ({"protected_tokens": 4}, [], "trained with 4 protected tokens"),
        (
            {"activation": "relu"},
            [],
            "take hidden_act from the base model's config, 'silu', and the adapter has 'relu'",
        ),
        ({"layers_to_transform": [0, 2]}, [], "in each of the 4 layers"),
        ({}, ["--memory-size", "0"], "--memory-size 0"),
        ({"family": "granite"}, [], "family is 'granite'"),
        ({"base": {"num_key_value_heads": 4}}, [], "take num_key_value_heads"),
    ],
)
def test_what_their_form_cannot_express(options, arguments, message, tmp_path, capsys):
    options = {"gate_width": 8, "protected_tokens": 0} | options
    family, base = options.pop("family", "llama"), options.pop("base", {})
    get_peft_model(tiny_model(family), RetentionGateConfig(**options)).save_pretrained(tmp_path / "ours")
    tiny_config(family, **base).save_pretrained(tmp_path / "base")
    source = ["convert", "--to", "trimkv", str(tmp_path / "ours"), str(tmp_path / "theirs"), "--base-model"]
    assert command([*source, str(tmp_path / "base"), "--memory-size", "64", *arguments]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "theirs").exists()


def test_protected_tokens_and_shares_are_left_out_when_told_so(tmp_path, capsys):
    config = RetentionGateConfig(gate_width=8, budget_shares=[[1.0, 2.0]] * 4)
    get_peft_model(tiny_model(), config).save_pretrained(tmp_path / "ours")
    tiny_config("llama").save_pretrained(tmp_path / "base")
    arguments = ["convert", "--to", "trimkv", str(tmp_path / "ours"), str(tmp_path / "theirs")]
    arguments += ["--base-model", str(tmp_path / "base"), "--memory-size", "64", "--drop-protected-tokens"]
    assert command(arguments) == 0
    assert "shares of the budget have no place" in capsys.readouterr().out
    assert json.loads((tmp_path / "theirs" / "config.json").read_text())["global_capacity"] is False


@torch.no_grad()
def test_the_tied_layer_is_one_module_through_saving_and_loading(tmp_path):
    config = RetentionGateConfig(gate_type="tied_mlp", gate_width=8, initial_half_life=20.0)
    model = get_peft_model(tiny_model(), config)
    outputs = [layer.active_gate.output for layer in find_gated_model(model).gated_layers]
    assert all(output is outputs[0] for output in outputs)
    own = 4 * (8 * 32 + 8 + 8 * 8 + 8) + 2 * 8 + 2  # what layers have for themselves, and what they share
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == own
    for parameter in model.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter)
    model.eval().save_pretrained(tmp_path)
    stored = load_file(tmp_path / "adapter_model.safetensors")
    assert sum("output.weight" in key for key in stored) == 4  # as in the authors' files, each layer's is whole
    for lean in (False, True):
        again = PeftModel.from_pretrained(tiny_model(), tmp_path, low_cpu_mem_usage=lean).eval()
        outputs = [layer.active_gate.output for layer in find_gated_model(again).gated_layers]
        assert all(output is outputs[0] for output in outputs)
        torch.testing.assert_close(again(IDS, use_cache=False).logits, model(IDS, use_cache=False).logits)
    again.load_adapter(tmp_path, "second")
    first, second = (find_gated_model(again).gated_layers[0].retention_gate[n] for n in ("default", "second"))
    assert first.output is not second.output  # adapters share nothing


def test_tied_layers_that_differ_are_refused(tmp_path, monkeypatch):
    from safetensors.torch import save_file

    get_peft_model(tiny_model(), RetentionGateConfig(gate_type="tied_mlp", gate_width=8)).save_pretrained(tmp_path)
    stored = load_file(tmp_path / "adapter_model.safetensors")
    key = next(key for key in stored if "layers.2" in key and "output.bias" in key)
    save_file({**stored, key: stored[key] + 1}, tmp_path / "adapter_model.safetensors")
    config = json.loads((tmp_path / "adapter_config.json").read_text()) | {"weights_sha256": None}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    for lean in (False, True):
        with pytest.raises(ValueError, match="differs from .*though all layers share it"):
            PeftModel.from_pretrained(tiny_model(), tmp_path, low_cpu_mem_usage=lean)


def test_a_tied_gate_learns(tmp_path):
    config = RetentionGateConfig(gate_type="tied_mlp", gate_width=8, initial_half_life=4.0)
    model = get_peft_model(tiny_model(), config)
    model(IDS, use_cache=False).logits.square().mean().backward()
    gates = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert sum("output" in name for name in gates) == 2
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in gates.values())
