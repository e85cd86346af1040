"""Gates on a base model that is spread, offloaded, quantised by bitsandbytes, or tensor parallel."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from accelerate import cpu_offload, disk_offload, dispatch_model
from accelerate.hooks import remove_hook_from_submodules
from gated_models import gated_model
from peft import PeftModel, get_peft_model
from tiny_models import tiny_model
from transformers import AutoModelForCausalLM

from retention_gates import (
    BoundedCache,
    RetentionGateConfig,
    RetentionTrainer,
    RetentionTrainingArguments,
    find_gated_model,
)

IDS = torch.randint(3, 96, (2, 20), generator=torch.Generator().manual_seed(1))
CONFIG = {"gate_width": 16, "initial_half_life": 5.0}


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> Path:
    """A base model and an adapter for it."""
    folder = tmp_path_factory.mktemp("placement")
    tiny_model(eos_token_id=None).save_pretrained(folder / "base")
    gated_model().save_pretrained(folder / "gates")
    return folder


def generate(model) -> torch.Tensor:
    ids = IDS.to(next(model.parameters()).device if torch.cuda.is_available() else "cpu")
    cache = BoundedCache(model, 8)
    output = model.generate(
        input_ids=ids, past_key_values=cache, max_new_tokens=12, do_sample=False, output_logits=True,
        return_dict_in_generate=True,
    )  # fmt: skip
    return torch.stack(output.logits).cpu()


def spread(first: object, second: object) -> dict[str, object]:
    """The second half of the layers elsewhere than all the rest."""
    devices = {"model.embed_tokens": first, "model.norm": first, "model.rotary_emb": first, "lm_head": first}
    return devices | {f"model.layers.{layer}": first if layer < 2 else second for layer in range(4)}


def test_a_base_with_layers_on_the_disk(files, tmp_path):
    def load():
        return AutoModelForCausalLM.from_pretrained(
            files / "base", device_map=spread("cpu", "disk"), offload_folder=tmp_path
        )

    with pytest.raises(ValueError, match="are offloaded to the disk"):
        PeftModel.from_pretrained(load(), files / "gates")
    base = load()
    assert base.model.layers[3].self_attn.q_proj.weight.is_meta
    model = get_peft_model(base, RetentionGateConfig(**CONFIG, protected_tokens=2)).eval()
    trained = gated_model()
    layers, own = find_gated_model(model).gated_layers, find_gated_model(trained).gated_layers
    for layer, other in zip(layers, own, strict=True):
        assert {p.device.type for p in layer.active_gate.parameters()} == {"cpu"}
        layer.active_gate.load_state_dict(other.active_gate.state_dict())
    torch.testing.assert_close(generate(model), generate(trained), rtol=1e-4, atol=1e-4)


def offload(model, how: str, folder) -> None:
    """Offloads the base model with its gates, the whole or the second half, as accelerate's users do."""
    base = model.get_base_model()
    if how == "cpu":
        cpu_offload(model, execution_device="cpu")
    elif how == "disk":
        disk_offload(base, str(folder), execution_device="cpu")
    else:
        dispatch_model(base, spread("cpu", "disk"), main_device="cpu", offload_dir=str(folder))


@pytest.mark.parametrize("how", ["cpu", "disk", "half"])
@pytest.mark.parametrize("gate_type", ["mlp", "tied_mlp"])
def test_gates_that_were_offloaded_with_their_base(how, gate_type, tmp_path):
    def load():
        torch.manual_seed(0)
        config = RetentionGateConfig(**CONFIG, gate_type=gate_type)
        return get_peft_model(tiny_model(eos_token_id=None), config).eval()

    expected, model = generate(load()), load()
    offload(model, how, tmp_path / "weights")
    assert find_gated_model(model).gated_layers[-1].active_gate.output.weight.is_meta
    torch.testing.assert_close(generate(model), expected)

    cache = BoundedCache(model, 8)
    with torch.no_grad():
        model(input_ids=IDS, past_key_values=cache)
    with pytest.raises(ValueError, match=r"gates are offloaded .*remove_hook_from_submodules"):
        cache.save(tmp_path / "memory")
    with pytest.raises(ValueError, match=r"gates are offloaded .*nothing to save"):
        model.save_pretrained(tmp_path / "gates")
    rows = [{name: torch.arange(3, 19) for name in ("input_ids", "position_ids", "labels")}]
    arguments = RetentionTrainingArguments(
        output_dir=str(tmp_path / "run"), memory_size=8, max_steps=1, use_cpu=True, report_to=[]
    )
    with pytest.raises(ValueError, match=r"the gate of layer \d: .* is offloaded .*nothing would be trained"):
        RetentionTrainer(model, arguments, rows)
    assert not list(tmp_path.glob("memory*")) and not list(tmp_path.glob("gates/*.safetensors"))

    remove_hook_from_submodules(model.get_base_model())  # the way that the errors name
    assert not any(p.is_meta for p in model.parameters())
    cache.save(tmp_path / "memory")
    torch.testing.assert_close(generate(model), expected)


@pytest.mark.parametrize("how", ["cpu", "disk", "half", "preloaded"])
@pytest.mark.parametrize("gate_type", ["mlp", "tied_mlp", "linear"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_loop_of_ones_own_is_told_that_offloaded_gates_get_no_gradient(how, gate_type, checkpointing, tmp_path):
    """Nothing says so in accelerate: gradients reach parameters that are there for one forward pass."""
    model = get_peft_model(tiny_model(eos_token_id=None), RetentionGateConfig(**CONFIG, gate_type=gate_type))
    if how == "preloaded" and (checkpointing or gate_type == "tied_mlp"):
        pytest.skip("accelerate itself fails where such a layer is computed again or shares weights")
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.train()

    def train() -> bool:
        """Whether a step changes every gate."""
        gates = [p for p in model.parameters() if p.requires_grad]
        before = [p.detach().clone() for p in gates]
        optimizer = torch.optim.SGD(gates, lr=0.1)
        model(input_ids=IDS, labels=IDS, use_cache=False).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return all((p != old).any() for p, old in zip(gates, before, strict=True))

    assert train()
    if how == "preloaded":
        whole = {"preload_module_classes": [type(model.get_base_model().model.layers[0]).__name__]}
        dispatch_model(
            model.get_base_model(), spread("cpu", "disk"), main_device="cpu", offload_dir=str(tmp_path), **whole
        )
    else:
        offload(model, how, tmp_path / "weights")
    with torch.no_grad():
        model(input_ids=IDS, use_cache=False)  # reading is fine
    with pytest.raises(ValueError, match=r"gate of layer \d is offloaded .*gradient would be lost.*remove_hook_from"):
        train()
    remove_hook_from_submodules(model.get_base_model())
    assert train()


def test_a_whole_base_that_is_offloaded_is_not_trained_on(tmp_path):
    base = tiny_model(eos_token_id=None)
    cpu_offload(base, execution_device="cpu")
    model = get_peft_model(base, RetentionGateConfig(**CONFIG))
    rows = [{name: torch.arange(3, 19) for name in ("input_ids", "position_ids", "labels")}]
    arguments = RetentionTrainingArguments(
        output_dir=str(tmp_path), memory_size=8, max_steps=1, use_cpu=True, report_to=[]
    )
    with pytest.raises(ValueError, match="the embedding is offloaded"):
        RetentionTrainer(model, arguments, rows)


def test_a_memory_of_a_base_with_layers_on_the_disk(files, tmp_path):
    base = AutoModelForCausalLM.from_pretrained(
        files / "base", device_map=spread("cpu", "disk"), offload_folder=tmp_path / "weights"
    )
    model = get_peft_model(base, RetentionGateConfig(**CONFIG)).eval()
    cache = BoundedCache(model, 8)
    with torch.no_grad():
        model(input_ids=IDS, past_key_values=cache)
    cache.save(tmp_path / "memory")
    loaded = BoundedCache.load(model, tmp_path / "memory")
    with torch.no_grad():
        more = [model(input_ids=IDS[:, :5], past_key_values=one).logits for one in (cache, loaded)]
    assert torch.equal(*more)


def test_a_model_without_numbers_generates_nothing():
    model = gated_model().to("meta")
    with pytest.raises(ValueError, match="embed_tokens.weight is on the meta device, which holds no numbers"):
        generate(model)


@pytest.mark.multi_gpu
@pytest.mark.parametrize("device_map", [spread(0, 1), "auto", "balanced"])
def test_a_base_over_two_gpus(files, device_map):
    base = AutoModelForCausalLM.from_pretrained(files / "base", device_map=device_map)
    model = PeftModel.from_pretrained(base, files / "gates", is_trainable=True).eval()
    for layer in find_gated_model(model).gated_layers:
        weights = {p.device for p in layer.base_layer.parameters()}
        assert {p.device for p in layer.active_gate.parameters()} == weights
    one = PeftModel.from_pretrained(tiny_model(eos_token_id=None).to("cuda:0"), files / "gates").eval()
    torch.testing.assert_close(generate(model), generate(one), rtol=1e-3, atol=1e-3)
    model.train()(IDS.to("cuda:0"), use_cache=False).logits.square().mean().backward()
    gates = [p for layer in find_gated_model(model).gated_layers for p in layer.active_gate.parameters()]
    assert all(p.grad.abs().sum() > 0 for p in gates)


@pytest.mark.parametrize("bits", [4, 8])
def test_gates_on_a_base_that_bitsandbytes_quantised(bits, tmp_path):
    bitsandbytes = pytest.importorskip("bitsandbytes")
    from transformers import BitsAndBytesConfig

    tiny_model(hidden_size=64, intermediate_size=64, head_dim=16).save_pretrained(tmp_path / "base")
    options = {"bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": torch.float32} if bits == 4 else {}
    quantised = BitsAndBytesConfig(load_in_4bit=bits == 4, load_in_8bit=bits == 8, **options)

    def load():
        return AutoModelForCausalLM.from_pretrained(
            tmp_path / "base", quantization_config=quantised, device_map={"": "cpu"}, dtype=torch.float32
        )

    base = load()
    kinds = {4: bitsandbytes.nn.Linear4bit, 8: bitsandbytes.nn.Linear8bitLt}
    assert isinstance(base.model.layers[0].self_attn.q_proj, kinds[bits])
    model = get_peft_model(base, RetentionGateConfig(**CONFIG)).train()
    model(IDS, use_cache=False).logits.square().mean().backward()
    gates = [p for layer in find_gated_model(model).gated_layers for p in layer.active_gate.parameters()]
    assert all(p.dtype == torch.float32 and p.grad.abs().sum() > 0 for p in gates)
    for parameter in gates:
        torch.nn.init.normal_(parameter, std=0.5)
    with model.disable_adapter(), torch.no_grad():
        assert torch.equal(model.eval()(IDS).logits, load()(IDS).logits)
    model.save_pretrained(tmp_path / "gates")
    again = PeftModel.from_pretrained(load(), tmp_path / "gates").eval()
    torch.testing.assert_close(generate(again), generate(model))


def test_a_tensor_parallel_base_is_refused_before_anything_is_touched():
    base = tiny_model()
    base._tp_size = 2
    with pytest.raises(ValueError, match="is tensor parallel over 2 processes .* device_map"):
        get_peft_model(base, RetentionGateConfig(**CONFIG))
    base._tp_size = 1
    get_peft_model(base, RetentionGateConfig(**CONFIG))(IDS, use_cache=False)


PARALLEL = """
import sys, torch.distributed as dist
from peft import PeftModel
from transformers import AutoModelForCausalLM
import retention_gates

dist.init_process_group("gloo")
base = AutoModelForCausalLM.from_pretrained(sys.argv[1] + "/base", tp_plan="auto")
try:
    PeftModel.from_pretrained(base, sys.argv[1] + "/gates")
except ValueError as error:
    print("refused:", error)
dist.destroy_process_group()
"""


@pytest.mark.slow  # two processes that import torch, 20 s
def test_a_base_that_really_is_tensor_parallel(files, tmp_path):
    (tmp_path / "parallel.py").write_text(PARALLEL)
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    command = [*launch, str(tmp_path / "parallel.py"), str(files)]
    answer = subprocess.run(command, capture_output=True, text=True, timeout=200, env=environment)
    assert answer.returncode == 0, answer.stderr[-3000:]
    assert answer.stdout.count("is tensor parallel over 2 processes") == 2
