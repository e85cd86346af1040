"""A training run that takes seconds: a tiny model with its tokenizer, a few texts, and the YAML file."""

import json
import random
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from safetensors.torch import load_file
from tiny_models import tiny_model
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from retention_gates.trainers.callbacks import UNREPEATABLE

WORDS = "the a old new red blue ship sea storm king queen castle road river sings sleeps runs under over and".split()


def make_model(folder: Path, layers: int = 4) -> Path:
    """A llama with random weights, and a word tokenizer, as a folder that from_pretrained reads."""
    tokenizer = Tokenizer(models.WordLevel(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    special = ["<pad>", "<|endoftext|>", "</s>", "<unk>"]
    tokenizer.train_from_iterator([" ".join(WORDS)], trainers.WordLevelTrainer(special_tokens=special))
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>")
    fast.save_pretrained(folder)
    tiny_model("llama", vocab_size=len(fast), num_hidden_layers=layers).save_pretrained(folder)
    return folder


def make_texts(folder: Path, works: int = 4, words: int = 600) -> Path:
    folder.mkdir()
    for work in range(works):
        chosen = random.Random(work).choices(WORDS, k=words)
        (folder / f"work{work}.txt").write_text(" ".join(chosen), encoding="utf-8")
    return folder


def make_short_documents(path: Path) -> Path:
    """Of 2 to 60 words each, so that rows of 48 tokens differ in how many forecasts they have."""
    lengths = random.Random(0).choices(range(2, 60), k=120)
    lines = [json.dumps({"text": " ".join(random.Random(i).choices(WORDS, k=n))}) for i, n in enumerate(lengths)]
    path.write_text("\n".join(lines), encoding="utf-8")
    return path


def make_run(folder: Path, layers: int = 4, **training: object) -> Path:
    """Writes model, texts and run.yaml; gives the path of the latter. Rows of 48 tokens, 8 steps of 2 rows."""
    run = {
        "model": {"name": str(make_model(folder / "model", layers))},
        "gate": {"gate_width": 16, "initial_half_life": 20.0},
        "data": {"sources": [str(make_texts(folder / "texts"))], "row_length": 48, "test_works": ["work3"]},
        "evaluation": {"rows": 2, "row_length": 48},
        "calibration": {"rows": 2, "row_length": 48},
        "training": {
            "output_dir": str(folder / "out"),
            "objective": "layerwise",
            "memory_size": 8,
            "max_steps": 8,
            "per_device_train_batch_size": 2,
            "learning_rate": 0.01,
            "warmup_steps": 2,
            "logging_steps": 1,
            "save_steps": 3,
            "eval_strategy": "steps",
            "eval_steps": 4,
            "eval_memory_sizes": [8],
            "report_to": [],
            "use_cpu": True,
        }
        | training,
    }
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(run), encoding="utf-8")
    return path


def train_command(*arguments: str) -> list[str]:
    return [str(Path(sys.executable).parent / "retention-gates"), "train", *arguments]


def run_quietly(command: list[str], **options) -> subprocess.CompletedProcess:
    return subprocess.run(command, capture_output=True, text=True, timeout=300, **options)


def logged(output_dir: Path) -> list[dict]:
    """The lines of log.jsonl, without what depends on the clock."""
    lines = [json.loads(line) for line in (output_dir / "log.jsonl").read_text(encoding="utf-8").splitlines()]
    return [{key: value for key, value in line.items() if not key.startswith(UNREPEATABLE)} for line in lines]


def run_on_ranks(folder: Path, runs: list[dict]) -> None:
    """Train commands one after the other, as run_ranks.py takes them; what they say is in folder/runs.output."""
    (folder / "runs.json").write_text(json.dumps(runs))
    driver = Path(__file__).with_name("run_ranks.py")
    done = run_quietly([sys.executable, str(driver), str(folder / "runs.json")])
    assert done.returncode == 0, done.stderr[-4000:]


def assert_same_run(many: Path, one: Path, *, rel: float, weights: float) -> None:
    """Two runs of the same rows on different ranks: fp32 sums in another order, which Adam carries into the gates.

    Args:
        rel: largest relative difference of what is logged.
        weights: largest difference of the gates' weights.
    """
    runs = (many, one)
    logs = [logged(run) for run in runs]
    names = {name for line in logs[1] for name in line} - {"epoch", "step"}
    assert {"loss", "capacity_loss", "retained_mass", "eval_kl_8"} <= names
    # A resumed run has no loss of its first steps; log_half_life is a mean over the tokens of a pass that decay, of
    # which passes have different numbers.
    for name in names - {"total_flos", "train_loss", "log_half_life"}:
        values = [[line[name] for line in lines if name in line] for lines in logs]
        assert len(values[0]) == len(values[1]) > 0
        assert values[0] == pytest.approx(values[1], rel=rel, abs=rel / 10), name
    gates = [load_file(run / "adapter" / "adapter_model.safetensors") for run in runs]
    assert gates[0].keys() == gates[1].keys()
    for name, other in gates[1].items():
        assert ((gates[0][name] - other).abs() < weights).all(), name
