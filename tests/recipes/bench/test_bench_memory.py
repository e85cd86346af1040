"""The benches of bounded memory, as far as a CPU goes."""

import sys

import pytest
import torch
from tiny_adapter import make_files

from retention_gates.gates.cache import BoundedCache
from retention_gates.recipes.bench import cache_quality, prefill, streaming
from retention_gates.recipes.loading.models import load_model


def run(bench, monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["bench", *arguments])
    bench.main()


def test_prefill_checks_itself_on_a_cpu(monkeypatch, capsys):
    size = ("--device", "cpu", "--tokens", "210", "--chunk", "100", "--memory-size", "48")
    run(prefill, monkeypatch, *size)
    assert "T=210: largest errors" in capsys.readouterr().out
    ragged = prefill.ragged(48)
    assert sum(ragged) == 48 * prefill.HEADS and len(set(ragged)) > 4
    monkeypatch.setattr(prefill, "attend_in_blocks", lambda query, *rest, **options: query.new_zeros(query.shape))
    with pytest.raises(SystemExit, match="the second chunk is off"):
        run(prefill, monkeypatch, *size)


def test_a_stream_of_a_few_tokens(monkeypatch, capsys):
    measured = []
    monkeypatch.setattr(streaming, "report", lambda name, rows: measured.extend(rows))
    run(streaming, monkeypatch, "--device", "cpu", "--tokens", "60", "--memory-size", "8")
    assert [row.contender for row in measured] == [f"ours, tenth {i}" for i in range(1, 11)]
    assert all(row.value > 0 and row.peak_mib > 0 for row in measured)
    assert "last tenth over first" in capsys.readouterr().out


def test_quality_is_measured_against_the_base_model(tmp_path):
    model = load_model(None, str(make_files(tmp_path).adapter))
    rows = torch.randint(4, 20, (2, 30), generator=torch.Generator().manual_seed(0))
    full = cache_quality.full_logits(model, rows, 12)
    assert full.shape[:2] == (2, 17)
    losses = [
        cache_quality.text_loss(model, BoundedCache(model, size, **arguments), rows, full, 12)
        for size, arguments in ((40, {}), (8, {}), (40, {"cache_dtype": "int8"}))
    ]
    enough, small, stored = (float(loss.mean()) for loss in losses)
    assert abs(enough) < 1e-4 < small and enough < stored < small
    prompt = rows[0, :20].tolist()
    with torch.no_grad(), model.disable_adapter():
        likeliest = model(input_ids=rows[:1, :20]).logits[0, -1].argmax().item()
    cache = BoundedCache(model, 40)
    assert cache_quality.recalled(model, cache, prompt, [likeliest])
    assert not cache_quality.recalled(model, BoundedCache(model, 40), prompt, [(likeliest + 1) % 20])
