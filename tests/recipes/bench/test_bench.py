"""The benches of whole training steps and runs, as far as a CPU goes; on a GPU, a run that follows the naive one."""

import json
from functools import partial
from pathlib import Path

import pytest
import torch

from retention_gates import BoundedCache, RetentionGateConfig, find_gated_model
from retention_gates.recipes.bench import decode, follow_naive, train_step
from retention_gates.recipes.bench.decode_rivals import EagerCache
from retention_gates.recipes.bench.train_step import gated_step, make_batch, make_model, make_trainer, plain_step

TINY = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2}
TINY |= {"num_hidden_layers": 3, "max_position_embeddings": 128, "vocab_size": 300}


def test_train_step_compares_a_step_with_the_same_step_without_gates(tmp_path: Path):
    torch.manual_seed(0)
    model = make_model("cpu", torch.float32, head_dim=16, tie_word_embeddings=True, **TINY)
    batch = make_batch(48, 300, "cpu")
    trainer = make_trainer(model, batch, tmp_path)
    assert model.is_gradient_checkpointing and model.training
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    for layer in find_gated_model(model).gated_layers:
        layer.active_gate.output.bias.data.fill_(25.0)  # nothing decays: teacher and student are one
    loss, gradient = plain_step(model, trainer._output_head, batch)
    assert gradient.shape == (1, 48, 32) and gradient.any()
    assert not any(parameter.grad is not None for parameter in model.parameters())
    assert gated_step(trainer, batch).item() == pytest.approx(loss.item(), rel=1e-5)
    changed = {name for name, parameter in model.named_parameters() if not torch.equal(parameter, before[name])}
    assert changed and all("retention_gate" in name for name in changed)


def test_least_time_of_a_step():
    """4 x 36 passes over 101 M weights, attention 5.5 times, the head 3 times: 950 TFLOP at T = 16,384."""
    assert train_step.least_ms(16_384, 36, 1000.0) == pytest.approx(950, rel=0.01)


def test_the_largest_difference_is_relative_and_sees_nan():
    assert follow_naive.largest_difference([1.0, 4.1], [1.0, 4.0]) == pytest.approx(0.025)
    assert follow_naive.largest_difference([1.0, float("nan")], [1.0, 4.0]) == float("inf")
    assert follow_naive.largest_difference([float("nan"), 1.0], [1.0, 1.0]) == float("inf")


@pytest.mark.parametrize("form", ["naive", pytest.param("fused", marks=pytest.mark.gpu)])
def test_a_run_follows_the_naive_run(form: str):
    """On a CPU the same run twice, which must not differ; on a GPU with fused kernels."""
    ids = torch.randint(300, (4000,), generator=torch.Generator().manual_seed(1))
    rows = follow_naive.Windows(ids, 20, 100)
    base = follow_naive.random_base(**TINY)

    def run(form: str, steps: int = 10) -> list[float]:
        gate = RetentionGateConfig(gate_width=16, initial_half_life=20.0)
        options = {"max_steps": steps, "per_device_train_batch_size": 2, "memory_size": 8, "learning_rate": 1e-2}
        return follow_naive.losses_of(form, base, rows, gate, use_cpu=not torch.cuda.is_available(), **options)

    reference, ours = run("naive"), run(form)
    assert len(reference) == 10 and reference[-1] != reference[0]
    assert follow_naive.largest_difference(ours, reference) <= (0 if form == "naive" else follow_naive.GOAL)


def test_decode_bench_budgets_and_its_eager_rival():
    budgets = decode.ragged_budgets(6, 4, 256)
    entries = [entry for row in budgets for entry in row]
    assert sum(entries) == 24 * 256 and min(entries) >= 32 and max(entries) > 3 * 256
    model = decode.make_model("tiny", "cpu", torch.float32)
    ids = torch.randint(100, (2, 20), generator=torch.Generator().manual_seed(0))
    found = [
        model.generate(input_ids=ids, past_key_values=cache, do_sample=False, max_new_tokens=30)
        for cache in (BoundedCache(model, 12, protected_tokens=0), EagerCache(model, 12, buffer_size=1))
    ]
    assert torch.equal(*found)


def test_decode_bench_steps_the_endpoints_rows():
    value, spread = decode.rows_ms(decode.make_model("tiny", "cpu", torch.float32), 2, 8, steps=3)
    assert 0 < value < 1000 and spread >= 0


def test_decode_bench_runs(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(decode, "report", partial(decode.report, results=tmp_path))
    monkeypatch.setattr(decode, "FEW", (3, 6))
    arguments = ["--shape", "tiny", "--device", "cpu", "--context", "90", "--memory-size", "40", "--batches", "2"]
    monkeypatch.setattr("sys.argv", ["decode.py", *arguments])
    decode.main()
    rows = [json.loads(line) for line in (tmp_path / "decode.jsonl").read_text().splitlines()]
    assert [row["contender"] for row in rows] == [
        "ours",
        "ours, ragged budgets",
        "eager cat, top-k, gather",
        "full cache, eager",
    ]
    assert all(row["value"] > 0 and row["unit"] == "tok/s" for row in rows)
    assert "full cache, eager" in capsys.readouterr().out
