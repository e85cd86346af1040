"""Python blocks of README and the guides run as they are written, on a small model in the place of the named one."""

import re
from pathlib import Path

import pytest
import torch
from peft import get_peft_model
from tiny_run import make_model

from retention_gates import RetentionGateConfig, RetentionTrainingArguments

ROOT = Path(__file__).resolve().parents[2]
PAGES = ("README.md", "docs/guides/generate.md", "docs/guides/memories.md", "docs/guides/train.md")
BLOCKS = [
    block
    for page in PAGES
    for block in re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(encoding="utf-8"), re.DOTALL)
]


def test_blocks_run_one_after_the_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys):
    from transformers import AutoModelForCausalLM

    monkeypatch.chdir(tmp_path)
    (tmp_path / "README.md").write_text("the old ship sings over the sea and the storm " * 90, encoding="utf-8")
    folder = make_model(tmp_path / "HuggingFaceTB" / "SmolLM2-135M-Instruct", layers=2)
    untrained = get_peft_model(AutoModelForCausalLM.from_pretrained(folder), RetentionGateConfig(gate_width=16))
    untrained.save_pretrained("checkpoints/smollm2_135m_instruct")
    shorten = RetentionTrainingArguments.__init__
    monkeypatch.setattr(
        RetentionTrainingArguments,
        "__init__",
        lambda self, *args, **options: shorten(self, *args, **options | {"max_steps": 2, "use_cpu": True}),
    )
    names: dict[str, object] = {}
    with torch.random.fork_rng():
        for block in BLOCKS:
            exec(compile(block, "a block", "exec"), names)
    assert len(BLOCKS) == len(PAGES) and (tmp_path / "book.memory.safetensors").is_file()
    assert (tmp_path / "out" / "run").is_dir() and "BoundedCache(memory_size=64" in capsys.readouterr().out


def test_readme_is_a_first_screen():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert len(text.split()) <= 900
    assert not re.search(r"\bcommit [0-9a-f]{7}|\bgoal\b", text)
