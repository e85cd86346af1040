"""What CONTRIBUTING says about a new eviction policy: ten lines, and cache, simulation and evaluation follow it."""

import re
from pathlib import Path

import pytest
import torch
from gated_models import gated_model, step_by_step, token_ids

from retention_gates.gates.cache import BoundedCache
from retention_gates.gates.policies import Policy
from retention_gates.gates.simulation.simulated_cache import SimulatedCache
from retention_gates.trainers.evaluation.contenders import Contender
from retention_gates.trainers.evaluation.text import compare_rows

CONTRIBUTING = Path(__file__).parents[3] / "CONTRIBUTING.md"


def policies_shown() -> dict[str, Policy]:
    """The policies that the section defines, by name."""
    section = CONTRIBUTING.read_text(encoding="utf-8").split("## A new eviction policy")[1].split("\n## ")[0]
    names: dict = {}
    for code in re.findall(r"```python\n(.*?)```", section, flags=re.DOTALL):
        assert len(code.splitlines()) <= 10
        exec(code, names)
    return {value.name: value for value in names.values() if isinstance(value, Policy)}


def test_two_are_shown():
    assert set(policies_shown()) == {"last_value", "fading_attention"}


@pytest.mark.parametrize("name", ["last_value", "fading_attention"])
def test_cache_simulation_and_evaluation_follow_it(name):
    policy, model, ids = policies_shown()[name], gated_model(), token_ids(1, 40)
    cache, simulated = BoundedCache(model, 8, policy=policy), SimulatedCache(model, 8, policy=policy)
    logits = step_by_step(model, ids[:, :-1], cache)
    with torch.no_grad():
        whole = model(input_ids=ids, past_key_values=simulated).logits
    torch.testing.assert_close(whole[:, :-1], logits, rtol=1e-4, atol=1e-4)
    for layer, held in zip(simulated.gated_layers, cache.gated_layers, strict=True):
        for head in (0, 1):
            kept = (layer.eviction_times[0, head, :39] > 39).nonzero().flatten()
            assert kept.tolist() == held.positions(head)[0].tolist() != list(range(31, 39))
    records = compare_rows(model, ids, [Contender(policy, 8), Contender("streaming_llm", 8)])
    scores = {record["policy"]: record["kl"] for record in records}
    assert scores[name] > 0 and scores[name] != scores["streaming_llm"]
