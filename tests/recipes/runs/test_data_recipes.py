"""The recipes for real data run on local files of the same form as the data sets that they name."""

import json
import random
import re
from pathlib import Path

import pytest
import yaml
from tiny_run import WORDS, logged, make_model
from transformers import AutoTokenizer

from retention_gates import cli
from retention_gates.recipes import train
from retention_gates.recipes.loading.run_config import load_config

RECIPES = Path(train.__file__).resolve().parent
TEMPLATE = (
    "{% for m in messages %}<|endoftext|> {{ m['role'] }} {{ m['content'] }} </s> {% endfor %}"
    "{% if add_generation_prompt %}<|endoftext|> assistant {% endif %}"
)


def words(seed: int, count: int) -> str:
    return " ".join(random.Random(seed).choices(WORDS, k=count))


def chat(seed: int, turns: int = 1) -> list[dict]:
    turn = [("user", 12), ("assistant", 40)] * turns
    return [{"role": role, "content": words(10 * seed + i, count)} for i, (role, count) in enumerate(turn)]


# One row of each data set, with its columns: what a recipe asks for is found among them.
FORMS = {
    "open-r1/OpenR1-Math-220k": lambda i: {
        "problem": words(i, 9),
        "solution": words(i, 20),
        "answer": "7",
        "problem_type": "Algebra",
        "uuid": str(i),
        "is_reasoning_complete": [True],
        "generations": [words(i, 30)],
        "messages": chat(i),
    },
    "emozilla/pg19": lambda i: {"short_book_title": f"book {i % 9}", "publication_date": 1900, "text": words(i, 150)},
    "zai-org/LongAlign-10k": lambda i: {"id": str(i), "length": 60, "messages": chat(i)},
    "HuggingFaceTB/smoltalk": lambda i: {"messages": chat(i, turns=3), "source": "smol-magpie-ultra"},
}


def local_copy(source: dict, folder: Path) -> dict:
    """The source as the recipe has it, but in a file, with three rows that cannot be read among 40."""
    path = folder / (source["source"].replace("/", "-") + ".jsonl")
    rows = [json.dumps(FORMS[source["source"]](i)) for i in range(40)]
    rows[5:5] = ['{"messages": [', json.dumps({"other": 1}), json.dumps(dict.fromkeys(json.loads(rows[0]), 3))]
    path.write_text("\n".join(rows), encoding="utf-8")
    hub_only = ("split", "subset", "streaming", "revision")
    kept = {key: value for key, value in source.items() if key not in hub_only}
    return kept | {"source": str(path), "token_budget": 2_000}


@pytest.mark.parametrize("name", ["reasoning", "long_context", "chat"])
def test_a_recipe_runs_on_files_of_the_same_form(tmp_path: Path, name: str, capsys: pytest.CaptureFixture):
    recipe = RECIPES / "runs" / f"{name}.yaml"
    config = load_config(recipe, [])
    assert config.training.rows_per_step and all(source.token_budget for source in config.data.sources)
    assert config.training.seed == 0 and len(config.training.eval_memory_sizes) == 3
    model = make_model(tmp_path / "model", layers=2)
    tokenizer = AutoTokenizer.from_pretrained(model)
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(model)

    run = yaml.safe_load(recipe.read_text())
    run["model"] = {"name": str(model)}
    run["data"]["sources"] = [local_copy(source, tmp_path) for source in run["data"]["sources"]]
    run["data"] |= {"row_length": 64, "task_share": 0.0, "tasks": [], "test_fraction": 0.3}
    run["evaluation"] = run["calibration"] = {"rows": 2, "row_length": 32}
    run["training"] |= {"output_dir": str(tmp_path / "out"), "max_steps": 2, "rows_per_step": 2, "use_cpu": True}
    run["training"] |= {"memory_size": 8, "eval_memory_sizes": [8], "eval_steps": 2, "logging_steps": 1}
    run["training"] |= {"disable_tqdm": True, "report_to": []}
    run["training"].pop("gradient_checkpointing_kwargs", None)  # moves checkpoints to the CPU from a GPU
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(run))
    assert cli.main(["train", str(tmp_path / "run.yaml")]) == 0
    said = capsys.readouterr().err
    assert all(f"{source['source']}: " in said for source in run["data"]["sources"])
    assert "3 bad rows skipped, the first: " in said or "2 bad rows" in said or "1 bad rows" in said
    if name != "long_context":  # its books come first
        assert re.search(r", ([\d,]+) of \1 assistant turns are targets", said)
    assert any("eval_kl_8" in line for line in logged(tmp_path / "out"))
    assert (tmp_path / "out" / "adapter" / "adapter_model.safetensors").is_file()
    summary = (tmp_path / "out" / "summary.md").read_text()
    for part in (
        "- steps: 2",
        "bad rows skipped",
        "| step | loss |",
        "| step | KL at 8 |",
        "| forward_and_backward |",
    ):
        assert part in summary
    assert "- tokens per second: " in summary and "- most memory (process): " in summary


@pytest.mark.parametrize("name", ["qwen2.5_coder_0.5b", "qwen2.5_coder_1.5b"])
def test_a_recipe_for_own_answers_runs_on_what_answers_writes(tmp_path: Path, name: str):
    recipe = RECIPES / "runs" / f"{name}.yaml"
    config = load_config(recipe, [])
    assert {Path(source.source).parts[1] for source in config.data.sources} == {name}
    model = make_model(tmp_path / "model", layers=2)
    tokenizer = AutoTokenizer.from_pretrained(model)
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(model)
    run = yaml.safe_load(recipe.read_text())
    asked = [line for line in recipe.read_text().splitlines() if "$ask" in line]
    assert len(asked) == len(run["data"]["sources"])
    for i, (line, source) in enumerate(zip(asked, run["data"]["sources"], strict=True)):
        column = line.split("--text-field ")[1].split()[0]
        output = Path(source["source"]).parent
        assert f"--output {output}" in line
        questions = tmp_path / f"{i}.jsonl"
        questions.write_text("".join(json.dumps({column: words(100 * i + k, 8)}) + "\n" for k in range(8)))
        given = ["answers", str(questions), "--model", str(model), "--text-field", column, "--temperature", "2"]
        given += [
            "--samples",
            "4",
            "--max-new-tokens",
            "60",
            "--device",
            "cpu",
            "--output",
            str(tmp_path / output.name),
        ]
        assert cli.main(given) == 0
        source["source"] = str(tmp_path / output.name / "answers.jsonl")
    run["model"] = {"name": str(model)}
    run["data"] |= {"row_length": 64, "task_share": 0.0, "tasks": [], "test_fraction": 0.3}
    run["calibration"] = {"rows": 2, "row_length": 32}
    run["training"] |= {"output_dir": str(tmp_path / "out"), "max_steps": 2, "use_cpu": True, "cuda_graph": False}
    run["training"] |= {"memory_size": 8, "disable_tqdm": True, "report_to": [], "dataloader_num_workers": 0}
    file = tmp_path / "run.yaml"
    file.write_text(yaml.safe_dump(run))
    assert cli.main(["train", str(file)]) == 0
    assert (tmp_path / "out" / "adapter" / "adapter_model.safetensors").is_file()
