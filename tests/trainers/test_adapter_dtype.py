"""Adapters stored in 16 bits: half the file, the same gates within rounding, and still checked when they are read."""

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from tiny_adapter import make_files
from transformers import AutoModelForCausalLM

from retention_gates import find_gated_model
from retention_gates.gates.adapter.files import WEIGHTS_NAME
from retention_gates.gates.adapter.gate_outputs import record
from retention_gates.trainers.adapter_dtype import store_as


@pytest.fixture
def files(tmp_path):
    return make_files(tmp_path)


def log_beta(files) -> torch.Tensor:
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(files.model), files.adapter)
    assert all(
        gate.dtype == torch.float32 for gate in find_gated_model(model).gated_layers[0].active_gate.parameters()
    )
    with torch.no_grad(), record(model) as recording:
        model(torch.arange(16)[None] + 4, use_cache=False)
    return torch.stack(recording.log_beta)


@pytest.mark.parametrize("dtype, error", [("float16", 2**-9), ("bfloat16", 2**-5)])
def test_gates_say_the_same_within_rounding(files, dtype, error):
    before, size = log_beta(files), (files.adapter / WEIGHTS_NAME).stat().st_size
    store_as(files.adapter, dtype)
    assert all(str(t.dtype) == f"torch.{dtype}" for t in load_file(files.adapter / WEIGHTS_NAME).values())
    assert (files.adapter / WEIGHTS_NAME).stat().st_size < 0.6 * size
    after = log_beta(files)  # the digest in the config is that of the new weights, or this would be refused
    assert not torch.equal(after, before)
    torch.testing.assert_close(after, before, rtol=error, atol=error * before.abs().max().item())


def test_what_cannot_be_stored_is_refused(files):
    with pytest.raises(ValueError, match="not 'int8'"):
        store_as(files.adapter, "int8")
    weights = load_file(files.adapter / WEIGHTS_NAME)
    key = next(key for key in weights if key.endswith("output.bias"))
    weights[key][0] = 1e6
    save_file(weights, files.adapter / WEIGHTS_NAME, metadata={"format": "pt"})
    with pytest.raises(ValueError, match="output.bias has values beyond the range of float16"):
        store_as(files.adapter, "float16")
    assert load_file(files.adapter / WEIGHTS_NAME)[key][0] == 1e6
