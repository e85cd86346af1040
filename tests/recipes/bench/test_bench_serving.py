"""The endpoint's bench, server and clients in one call, with a tiny model."""

import json
from functools import partial

import pytest

pytest.importorskip("fastapi", reason="needs the extra serve")
from retention_gates.recipes.bench import serving

OPTIONS = ["--shape", "tiny", "--device", "cpu", "--memory-size", "16", "--chats", "2", "--prompts", "40"]


def test_serving_bench_runs(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(serving, "report", partial(serving.report, results=tmp_path))
    monkeypatch.setattr("sys.argv", ["serving.py", *OPTIONS, "--answer", "60", "--contenders", "ours", "full"])
    serving.main()
    found = {path.stem: [json.loads(line) for line in path.read_text().splitlines()] for path in tmp_path.iterdir()}
    for bench, unit in (("serving", "tok/s"), ("serving_room", "chats/GiB")):
        assert [one["contender"] for one in found[bench]] == ["ours", "full cache, our step"]
        assert all(one["unit"] == unit and one["value"] > 0 for one in found[bench])
        assert {one["case"] for one in found[bench]} == {"tiny 2 chats prompt=40 answer=60"}
    ours, full = (one["value"] for one in found["serving_room"])
    assert ours > 4 * full  # 16 entries for 101, with a slot more
    assert "tok/s" in capsys.readouterr().out


def test_answers_that_fail_are_no_result():
    with pytest.raises(SystemExit, match="1 of 2 answers failed: cut"):
        serving.checked([serving.Stream(3), serving.Stream(2, "cut")])
