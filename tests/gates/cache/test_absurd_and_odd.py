"""Sizes that no machine has, spans without number, files that are none, numbers that 8 bits cannot hold."""

import os
import time

import pytest
import torch
from gated_models import gated_model, token_ids

from retention_gates import BoundedCache
from retention_gates.gates.cache.quantized_layer import pack, unpack
from retention_gates.gates.policies.eviction_rule import MOST_SPANS, merged_spans


@pytest.mark.parametrize("size", [10**10, 10**18, 10**400])
def test_a_memory_that_no_machine_has(size):
    began = time.monotonic()
    with pytest.raises(ValueError, match=rf"memory_size={size} takes .* GiB for one row .* choose at most [\d,]+\."):
        BoundedCache(gated_model(), memory_size=size)
    assert time.monotonic() - began < 10


def test_what_a_cache_says_of_itself():
    model = gated_model("gemma3_text")
    cache = BoundedCache(model, memory_size=8)
    assert repr(cache).startswith("BoundedCache(memory_size=8, policy='retention', budgets='uniform', ")
    assert repr(cache).endswith("layers evict; nothing read)") and "\n" not in repr(cache)
    with torch.no_grad():
        model(input_ids=token_ids(2, 30), past_key_values=cache)
    assert repr(cache).endswith("; 2 rows, 30 tokens read)")


def test_spans_that_touch_are_one_and_others_are_limited():
    assert merged_spans([(5, 7), (0, 2), (2, 3), (6, 9), (20, 21)]) == [(0, 3), (5, 9), (20, 21)]
    model = gated_model(num_hidden_layers=2)
    cache = BoundedCache(model, memory_size=2000, protected_tokens=0)
    for start in range(700):
        cache.pin(start, start + 1)
    assert cache.protected == ((0, 0), (0, 700))
    other = BoundedCache(model, memory_size=2000, protected_tokens=0)
    for start in range(MOST_SPANS - 1):
        other.pin(2 * start, 2 * start + 1)
    with pytest.raises(ValueError, match=f"{MOST_SPANS + 1} spans that do not touch would be protected, and at most"):
        other.pin(5000, 5001)
    assert len(other.protected) == MOST_SPANS


def test_a_memory_replaces_no_pipe_or_device(tmp_path):
    model = gated_model(num_hidden_layers=2)
    cache = BoundedCache(model, memory_size=8)
    with torch.no_grad():
        model(input_ids=token_ids(1, 12), past_key_values=cache)
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ValueError, match="is a device, a pipe or a socket and not a file"):
        cache.save(tmp_path / "pipe")
    assert (tmp_path / "pipe").is_fifo() and len(list(tmp_path.iterdir())) == 1


def test_a_memory_is_written_through_a_link(tmp_path):
    model = gated_model(num_hidden_layers=2)
    cache = BoundedCache(model, memory_size=8)
    with torch.no_grad():
        model(input_ids=token_ids(1, 12), past_key_values=cache)
    (tmp_path / "elsewhere").mkdir()
    for there in (tmp_path / "elsewhere" / "memory", tmp_path / "elsewhere" / "not yet"):
        link = tmp_path / f"link to {there.name}"
        link.symlink_to(there)
        for _ in range(2):
            cache.save(link)
            assert link.is_symlink() and there.is_file() and not there.is_symlink()
        assert BoundedCache.load(model, link).protected == cache.protected
    device = tmp_path / "link to a device"
    device.symlink_to("/dev/null")
    with pytest.raises(ValueError, match="is a device, a pipe or a socket"):
        cache.save(device)


@pytest.mark.parametrize("cache_dtype", ["int8", "fp8"])
@pytest.mark.parametrize("value", [float("inf"), float("nan")])
def test_a_memory_of_8_bits_with_what_is_no_number_is_not_saved(cache_dtype, value, tmp_path):
    """As in other dtypes; of the last layer, so that nothing after it tells."""
    model = gated_model(num_hidden_layers=2)
    cache = BoundedCache(model, memory_size=8, cache_dtype=cache_dtype)
    ids = token_ids(1, 12)
    broken = model.get_base_model().model.layers[1].self_attn.k_proj
    hook = broken.register_forward_hook(lambda module, given, keys: keys.index_fill(-1, torch.tensor([3]), value))
    with torch.no_grad():
        model(input_ids=ids, past_key_values=cache)
    hook.remove()
    with pytest.raises(ValueError, match="layers.1.keys has NaN or infinite values"):
        cache.save(tmp_path / "memory")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("cache_dtype", ["int8", "fp8"])
@pytest.mark.parametrize("bad", [float("inf"), float("-inf"), float("nan")])
def test_what_8_bits_cannot_hold_is_not_a_number(cache_dtype, bad):
    x = torch.randn(3, 8)
    x[1, 2] = bad
    found = unpack(pack(x, cache_dtype), cache_dtype, torch.float32)
    assert found[1].isnan().all() and torch.isfinite(found[[0, 2]]).all()


def test_gates_that_were_not_trained_are_not_after_they_were_off():
    model = gated_model()
    gates = [p for name, p in model.named_parameters() if "retention_gate" in name]
    model.requires_grad_(False)
    gates[0].requires_grad_(True)
    for _ in range(2):
        with model.disable_adapter():
            assert not any(p.requires_grad for p in gates)
        assert [p.requires_grad for p in gates] == [True] + [False] * (len(gates) - 1)
