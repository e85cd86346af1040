"""Slots of 8 bits: what is stored, how far off it is, and that everything else stays as it is."""

import pytest
import torch
from gated_models import gated_model, step_by_step, token_ids
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from retention_gates.gates.cache import BoundedCache
from retention_gates.gates.cache.quantized_layer import pack, unpack
from retention_gates.gates.simulation.simulated_cache import SimulatedCache

# of the largest number of an entry: half a step of int8; half a step of 3 bits of mantissa, right below 448
ERRORS = {"int8": 0.5 / 127, "fp8": 16 / 448}


@pytest.mark.parametrize("cache_dtype", ["int8", "fp8"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_entries_come_back_within_half_a_step(cache_dtype, dtype):
    x = torch.randn(3, 2, 5, 8, generator=torch.Generator().manual_seed(0)).to(dtype)
    x[0, 0, 0], x[0, 0, 1] = 0.0, x[0, 0, 1] * 1e4
    stored = pack(x, cache_dtype)
    assert stored.dtype == torch.uint8 and stored.shape == (3, 2, 5, 8 + 4)
    found = unpack(stored, cache_dtype, torch.float32)
    largest = x.float().abs().amax(-1, keepdim=True)
    assert ((found - x.float()).abs() <= ERRORS[cache_dtype] * largest * 1.001).all()
    assert (found[0, 0, 0] == 0).all() and unpack(stored, cache_dtype, dtype).dtype == dtype


def test_int8_by_hand():
    stored = pack(torch.tensor([1.0, -2.0, 0.5, 0.004]), "int8")
    assert stored[:4].view(torch.int8).tolist() == [64, -127, 32, 0]  # 63.5 and 31.75, halves to even
    assert stored[4:].view(torch.float32).item() == pytest.approx(2 / 127)


@pytest.mark.parametrize("cache_dtype", ["int8", "fp8"])
@pytest.mark.parametrize("buffer_size", [1, 3])
def test_the_same_entries_are_kept_and_outputs_are_near(cache_dtype, buffer_size):
    model, ids = gated_model(num_hidden_layers=1), token_ids(2, 60)
    logits, held = [], []
    for kind in (None, cache_dtype):  # in the first layer log_beta does not depend on what is stored
        cache = BoundedCache(model, memory_size=12, buffer_size=buffer_size, cache_dtype=kind)
        with torch.no_grad():
            read = model(input_ids=ids[:, :30], past_key_values=cache).logits
            steps = step_by_step(model, ids[:, 30:45], cache)
            more = model(input_ids=ids[:, 45:], past_key_values=cache).logits
        logits.append(torch.cat([read, steps, more], dim=1))
        held.append([cache.layers[0].positions(head) for head in (0, 1)])
    assert all(torch.equal(a, b) for a, b in zip(*held, strict=True))
    assert torch.equal(logits[0][:, :30], logits[1][:, :30])  # a prompt attends to itself as it is
    spread, off = logits[0].std(), (logits[0] - logits[1])[:, 30:].abs().max()
    assert 0 < off < spread * (0.05 if cache_dtype == "int8" else 0.3)


@pytest.mark.parametrize("cache_dtype", ["int8", "fp8"])
def test_bytes_held(cache_dtype):
    model = gated_model()
    cache = BoundedCache(model, memory_size=8, cache_dtype=cache_dtype)
    step_by_step(model, token_ids(3, 20), cache)
    entry = 2 * (8 + 4) + 4 + 8 + 1  # key and value of 8 bytes and their scales; score, position, pending
    counters = 4 * (3 * 8 + 8 + 2 * 8)  # as of the slots that are not quantized
    assert cache.memory_bytes() == 3 * cache.slots * entry + counters


def test_generate_beams_save_and_load(tmp_path):
    model, ids = gated_model(), token_ids(2, 20)
    options = dict(memory_size=12, budgets=[[9, 15], [12, 12], [20, 4], [5, 19]], cache_dtype="int8")
    cache = BoundedCache(model, **options)
    model.generate(input_ids=ids, past_key_values=cache, num_beams=2, max_new_tokens=10)
    cache = BoundedCache(model, **options)
    with torch.no_grad():
        model(input_ids=ids, past_key_values=cache)
    cache.save(tmp_path / "memory")
    loaded = BoundedCache.load(model, tmp_path / "memory", cache_dtype="int8")
    assert loaded.cache_dtype == "int8"
    with pytest.raises(ValueError, match="cache_dtype='int8', not 'fp8'"):
        BoundedCache.load(model, tmp_path / "memory", cache_dtype="fp8")
    more = token_ids(2, 15, seed=1)
    assert torch.equal(step_by_step(model, more, loaded), step_by_step(model, more, cache))
    nan = torch.tensor([float("nan")]).view(torch.uint8)
    cache.layers[1].keys[0, 0, -4:] = nan
    with pytest.raises(ValueError, match="layers.1.keys has NaN .* another dtype"):
        cache.save(tmp_path / "damaged")
    assert not (tmp_path / "damaged").exists()
    tensors = load_file(tmp_path / "memory")
    tensors["layers.1.keys"][0, 0, -4:] = nan
    with safe_open(tmp_path / "memory", framework="pt") as file:
        save_file(tensors, tmp_path / "damaged", metadata=file.metadata())
    with pytest.raises(ValueError, match="layers.1.keys has NaN"):
        BoundedCache.load(model, tmp_path / "damaged")


def test_what_is_refused():
    model = gated_model()
    for arguments, message in (
        (dict(cache_dtype="int4"), "cache_dtype='int4' is unknown: choose 'int8' or 'fp8'"),
        (dict(cache_dtype="int8", policy="h2o"), "policy='h2o'"),
        (dict(cache_dtype="int8", budgets="global"), "budgets='global'"),
        (dict(cache_dtype="int8", reserved=[(0, 5, 2)]), "reserved spans"),
    ):
        with pytest.raises(ValueError, match=message):
            BoundedCache(model, memory_size=8, **arguments)
    with pytest.raises(ValueError, match="a simulation stores nothing"):
        SimulatedCache(model, memory_size=8, cache_dtype="int8")
