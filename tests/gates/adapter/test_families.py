"""Every supported family: gates where they belong, the base untouched, the same attention where nothing decays."""

import pytest
import torch
from peft import PeftModel, get_peft_model
from tiny_models import FAMILIES, tiny_config, tiny_model
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, AutoModelForMaskedLM, DynamicCache

from retention_gates import BoundedCache, RetentionGateConfig, record
from retention_gates.trainers.output_head import OutputHead

IDS = torch.randint(3, 97, (2, 20), generator=torch.Generator().manual_seed(1))
every_family = pytest.mark.parametrize("family", FAMILIES)
# the base models of these two do not keep packed documents apart themselves
PACKS = [family for family in FAMILIES if family not in ("gpt_oss", "qwen3_next")]


def gated(family: str, **config):
    model = get_peft_model(tiny_model(family), RetentionGateConfig(**({"gate_width": 8} | config)))
    return model.eval()


@every_family
def test_gates_on_every_full_attention_layer_and_no_other(family):
    model = gated(family)
    assert [layer.base_layer.layer_idx for layer in model.base_model.gated_layers] == FAMILIES[family][1]
    assert model.peft_config["default"].gated_layers == FAMILIES[family][1]


@every_family
@torch.no_grad()
def test_gates_off_is_the_base_bit_for_bit(family):
    mask = torch.ones_like(IDS)
    mask[0, :6] = 0
    base = tiny_model(family)
    expected = [base(IDS).logits, base(IDS, attention_mask=mask).logits, base(IDS, use_cache=False).logits]
    model = gated(family, initial_half_life=4.0)
    assert not torch.equal(model(IDS, use_cache=False).logits, expected[0])
    with model.disable_adapter():
        got = [model(IDS).logits, model(IDS, attention_mask=mask).logits, model(IDS, use_cache=False).logits]
    for ours, theirs in zip(got, expected, strict=True):
        assert torch.equal(ours, theirs)


@every_family
@torch.no_grad()
def test_without_decay_the_attention_is_the_base_attention(family):
    """Softcap, sinks, scaling, sliding layers and padding are honoured: only the decay differs from the base."""
    mask = torch.ones_like(IDS)
    mask[0, :6] = 0
    model = gated(family, initial_half_life=1e30)
    for arguments in ({}, {"attention_mask": mask}):
        with model.disable_adapter():
            expected = model(IDS, use_cache=False, **arguments).logits
        logits = model(IDS, use_cache=False, **arguments).logits
        real = mask.bool() if arguments else torch.ones_like(IDS, dtype=torch.bool)
        torch.testing.assert_close(logits[real], expected[real], rtol=1e-4, atol=1e-4)


@every_family
@torch.no_grad()
def test_left_padding_changes_nothing_for_the_real_tokens(family):
    model = gated(family, initial_half_life=4.0)
    padded = torch.cat([torch.zeros(1, 5, dtype=torch.long), IDS[:1, :15]], dim=1)
    mask = (torch.arange(20) >= 5).long()[None]
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    logits = model(padded, attention_mask=mask, position_ids=positions, use_cache=False).logits
    alone = model(IDS[:1, :15], use_cache=False).logits
    torch.testing.assert_close(logits[:, 5:], alone, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", PACKS)
@torch.no_grad()
def test_packed_documents_are_separate(family):
    model = gated(family, initial_half_life=4.0)
    positions = torch.cat([torch.arange(8), torch.arange(12)])[None].expand(2, -1)
    with record(model) as packed_recording:
        packed = model(IDS, position_ids=positions, use_cache=False).logits
    torch.testing.assert_close(packed[:, 8:], model(IDS[:, 8:], use_cache=False).logits, rtol=1e-4, atol=1e-4)
    for log_beta in packed_recording.log_beta:
        assert (log_beta[..., 8:12] == 0).all() and (log_beta[..., :4] == 0).all()
        assert (log_beta[..., 4:8] < 0).all() and (log_beta[..., 12:] < 0).all()


@every_family
def test_gradients_reach_all_gates_and_nothing_else_with_and_without_checkpointing(family):
    gradients = []
    for checkpointing in (False, True):
        model = gated(family, initial_half_life=4.0).train()
        if checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        with record(model) as recording:
            hidden = model(IDS, use_cache=False, last_hidden_state_only=True)
        (hidden.square().mean() + sum(log_beta.mean() for log_beta in recording.log_beta)).backward()
        with_gradient = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        assert set(with_gradient) == {name for name, _ in model.named_parameters() if "retention_gate" in name}
        assert all(p.requires_grad == (name in with_gradient) for name, p in model.named_parameters())
        gradients.append(with_gradient)
    for name, gradient in gradients[0].items():
        assert gradient.abs().sum() > 0
        torch.testing.assert_close(gradients[1][name], gradient, rtol=1e-4, atol=1e-6)


@every_family
@torch.no_grad()
def test_save_load_and_bf16_base_keeps_fp32_gates(family, tmp_path):
    model = gated(family, initial_half_life=4.0)
    model.save_pretrained(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} >= {"adapter_config.json", "adapter_model.safetensors"}
    again = PeftModel.from_pretrained(tiny_model(family), tmp_path).eval()
    torch.testing.assert_close(again(IDS, use_cache=False).logits, model(IDS, use_cache=False).logits)
    with record(model) as expected, record(again) as got:
        model(IDS, use_cache=False)
        again(IDS, use_cache=False)
    for ours, theirs in zip(got.log_beta, expected.log_beta, strict=True):
        assert torch.equal(ours, theirs)

    half = PeftModel.from_pretrained(tiny_model(family).to(torch.bfloat16), tmp_path)
    half.to(torch.bfloat16)
    dtypes = {name: p.dtype for name, p in half.named_parameters() if "retention_gate" in name}
    assert set(dtypes.values()) == {torch.float32}
    saved, loaded = model.state_dict(), half.state_dict()
    assert all(torch.equal(saved[name], loaded[name]) for name in dtypes)
    assert half(IDS, use_cache=False).logits.isfinite().all()


@every_family
@torch.no_grad()
def test_output_head_is_the_models_own(family):
    model = gated(family)
    head = OutputHead.from_model(model)
    hidden = model(IDS, use_cache=False, last_hidden_state_only=True)
    torch.testing.assert_close(head.logits(hidden), model(IDS, use_cache=False).logits, rtol=1e-5, atol=1e-5)


def test_layerwise_error_is_zero_without_decay_and_trains_gates_only():
    for half_life, at_least in ((1e30, 0.0), (4.0, 1e-3)):
        model = gated("llama", initial_half_life=half_life).train()
        with model.disable_adapter(), torch.no_grad():
            teacher = model(IDS, use_cache=False, last_hidden_state_only=True)
        with record(model, layerwise=True) as recording:
            hidden = model(IDS, use_cache=False, last_hidden_state_only=True)
        assert not hidden.requires_grad
        torch.testing.assert_close(hidden, teacher, rtol=1e-4, atol=1e-4)
        losses = torch.stack(recording.layer_losses)
        assert len(losses) == 4 and (losses >= at_least).all() and (losses < 1e-8).all() == (at_least == 0.0)
        losses.sum().backward()
        assert {n for n, p in model.named_parameters() if p.grad is not None} == {
            n for n, _ in model.named_parameters() if "retention_gate" in n
        }


@pytest.mark.parametrize(
    ("model", "why"),
    [
        (
            lambda: AutoModelForCausalLM.from_config(tiny_config("deepseek_v3", kv_lora_rank=8, q_lora_rank=8)),
            "latent",
        ),
        (lambda: AutoModelForMaskedLM.from_config(CONFIG_MAPPING["bert"](**ENCODER)), "encoder"),
        (lambda: tiny_model("mistral", sliding_window=8), "bounded already"),
        (lambda: AutoModelForCausalLM.from_config(CONFIG_MAPPING["mamba"](vocab_size=97, **MAMBA)), "no causal"),
        (lambda: AutoModelForCausalLM.from_config(tiny_config("gemma3n_text", **SHARED)), "shares keys and values"),
        (lambda: torch.nn.Linear(2, 2), "no transformers model"),
    ],
)
def test_families_that_cannot_work_say_why(model, why):
    with pytest.raises(ValueError, match=why):
        get_peft_model(model(), RetentionGateConfig())


ENCODER = {"vocab_size": 97, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
SHARED = {"num_kv_shared_layers": 2, "vocab_size_per_layer_input": 97, "hidden_size_per_layer_input": 8}
MAMBA = {"hidden_size": 16, "num_hidden_layers": 2, "state_size": 4}


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@torch.no_grad()
def test_layers_without_a_gate_keep_the_base_attention(implementation):
    """Some layers gated, nothing decayed or evicted: the base, with padding, packing, and in two turns."""
    base = tiny_model("llama")
    base.set_attn_implementation(implementation)
    options = {"layers_to_transform": [0, 2], "gate_width": 8, "initial_half_life": 1e30}
    model = get_peft_model(base, RetentionGateConfig(**options)).eval()
    mask = torch.ones_like(IDS)
    mask[0, :6] = 0
    packed = torch.cat([torch.arange(8), torch.arange(12)])[None].expand(2, -1)
    for arguments in (
        {},
        {"attention_mask": torch.ones_like(IDS)},
        {"attention_mask": mask},
        {"position_ids": packed},
    ):
        with model.disable_adapter():
            expected = model(IDS, use_cache=False, **arguments).logits
        real = arguments.get("attention_mask", torch.ones_like(IDS)).bool()
        logits = model(IDS, use_cache=False, **arguments).logits
        torch.testing.assert_close(logits[real], expected[real], rtol=1e-4, atol=1e-4)
    with model.disable_adapter():
        expected = model(IDS).logits
    for cache in (BoundedCache(model, memory_size=64), DynamicCache(config=model.config)):
        turns = [model(IDS[:, turn], past_key_values=cache).logits for turn in (slice(0, 9), slice(9, 20))]
        torch.testing.assert_close(torch.cat(turns, dim=1), expected, rtol=1e-4, atol=1e-4)


def test_training_under_autocast():
    model = gated("llama", initial_half_life=4.0).train()
    with torch.autocast("cpu", torch.bfloat16), record(model) as recording:
        hidden = model(IDS, use_cache=False, last_hidden_state_only=True)
    assert hidden.isfinite().all() and {x.dtype for x in recording.log_beta} == {torch.float32}
