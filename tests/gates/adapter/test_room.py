"""Numbers that no machine has room for are refused with the largest one that fits, before anything is allocated."""

import re
import time

import pytest
import torch
from gated_models import gated_model, token_ids
from hypothesis import given
from hypothesis import strategies as st
from peft import get_peft_model
from tiny_models import tiny_model

from retention_gates import BoundedCache, RetentionGateConfig
from retention_gates.gates.adapter import placement
from retention_gates.gates.adapter.gate import GATES, gate_bytes
from retention_gates.gates.adapter.placement import check_room, device_bytes

CPU = torch.device("cpu")


@given(
    value=st.integers(1, 10**40),
    each=st.integers(1, 2**50),
    fixed=st.integers(0, 2**36),
    power=st.sampled_from([1, 2]),
)
def test_what_is_called_the_most_is_the_most(value, each, fixed, power):
    def bytes_of(number: int) -> int:
        return fixed + each * number**power

    there = device_bytes(CPU)
    try:
        check_room("wish", value, bytes_of, CPU, "for it")
    except ValueError as error:
        assert f"wish={value} takes {bytes_of(value) // 2**30:,} GiB for it, and cpu has" in str(error)
        assert bytes_of(value) > there
        most = re.search(r"choose at most ([\d,]+)\.$", str(error))
        if most is None:
            assert "not even 1 fits" in str(error) and bytes_of(1) > there
        else:
            number = int(most[1].replace(",", ""))
            assert bytes_of(number) <= there < bytes_of(number + 1)
    else:
        assert bytes_of(value) <= there


@pytest.mark.parametrize("gate_type", ["mlp", "tied_mlp"])
@pytest.mark.parametrize("width", [10**9, 2**31 - 1])
def test_a_gate_that_no_machine_has(gate_type, width, monkeypatch):
    monkeypatch.setattr(placement, "device_bytes", lambda device: 64 * 2**30)
    base, began = tiny_model("llama"), time.monotonic()
    with pytest.raises(
        ValueError, match=rf"gate_width={width} takes .* GiB for gates in \d+ layers, .* at most [\d,]+\."
    ):
        get_peft_model(base, RetentionGateConfig(gate_width=width, gate_type=gate_type))
    assert time.monotonic() - began < 5
    get_peft_model(base, RetentionGateConfig(gate_width=8, gate_type=gate_type))  # nothing is left of the first try


@pytest.mark.parametrize("gate_type", list(GATES))
def test_the_bytes_of_gates_are_those_that_they_have(gate_type):
    model = get_peft_model(tiny_model("llama"), RetentionGateConfig(gate_width=24, gate_type=gate_type))
    held = sum(p.nbytes for name, p in model.named_parameters() if "retention_gate" in name)
    assert gate_bytes(model.peft_config["default"], 24) == held


def test_an_answer_longer_than_a_cache_may_read():
    model, ids = gated_model(), token_ids(1, 9)
    cache, most = BoundedCache(model, memory_size=8), 2**24 - 9
    with pytest.raises(ValueError, match=rf"max_new_tokens={10**12} after 9 tokens .* ask for at most {most:,}\."):
        model.generate(input_ids=ids, past_key_values=cache, max_new_tokens=10**12)
    assert cache.get_seq_length() == 0
    model.generate(input_ids=ids, past_key_values=cache, max_new_tokens=3, do_sample=False)


def test_the_memory_of_a_device_is_asked_for_once(monkeypatch):
    monkeypatch.setattr(placement, "device_bytes", lambda device: 1000)
    with pytest.raises(ValueError, match="choose at most 99, |choose at most 100\\."):
        check_room("n", 101, lambda n: 10 * n, CPU, "")
    check_room("n", 100, lambda n: 10 * n, CPU, "")
