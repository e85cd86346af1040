"""The model card of an adapter, made of what its files say; a section without a source is left out."""

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from retention_gates.checkpoints.evaluation_files import report_of, without_folders
from retention_gates.gates.adapter.files import CONFIG_NAME, WEIGHTS_NAME

CARD_NAME, RUN_FILE, LOG = "README.md", "run.yaml", "log.jsonl"
STOCK = "[More Information Needed]"  # of the card that PEFT writes with every adapter
TAGS = ["retention-gates", "kv-cache", "kv-cache-eviction", "trim-kv"]
EQUATIONS = {
    "mlp": "log_beta = logsigmoid(W2 act(W1 x + b1) + b2)",
    "linear": "log_beta = logsigmoid(W x + b)",
    "tied_mlp": "log_beta = logsigmoid(W3 act(W2 act(W1 x + b1) + b2) + b3), where all layers share W3 and b3",
}
SOURCES = {"tied_mlp": 'DBTrimKV, "Make Each Token Count", arXiv 2605.09649'}
SOURCE = 'TRIM-KV, "Cache What Lasts", arXiv 2512.03324'


@dataclass(frozen=True)
class CardFacts:
    """The parts of a card that the adapter's folder does not tell."""

    repository: str  # user/adapter
    base_model: str  # its name on the Hub
    licence: str | None = None  # an identifier of the Hub, such as apache-2.0
    revision: str | None = None  # the branch that is uploaded to
    evaluations: tuple[Path, ...] = ()  # folders that `evaluate` wrote


def own_card(folder: Path) -> str | None:
    """The text of a card that somebody wrote for this adapter; None for none, or for PEFT's empty form."""
    path = folder / CARD_NAME
    text = path.read_text(encoding="utf-8") if path.is_file() else ""
    return None if not text.strip() or STOCK in text else text


def model_card(folder: Path, facts: CardFacts) -> str:
    """The text of README.md, metadata included.

    Raises:
        ValueError: for an evaluation of another adapter, or files of the run that cannot be read.
    """
    config = json.loads((folder / CONFIG_NAME).read_text(encoding="utf-8"))
    sections = [
        _introduction(folder, facts),
        _use(config, facts),
        _method(config),
        _gates(config, facts, (folder / WEIGHTS_NAME).stat().st_size),
        _training(folder.parent, config),
        *(_evaluation(each, folder, facts) for each in facts.evaluations),
        _versions(config),
        f"## Licence\n\n{facts.licence}" if facts.licence else None,
    ]
    return with_metadata("\n\n".join(section for section in sections if section) + "\n", facts)


def with_metadata(text: str, facts: CardFacts) -> str:
    """The card with the metadata that the Hub indexes; what the text has already stays."""
    metadata: dict[str, Any] = {
        "base_model": facts.base_model,
        "base_model_relation": "adapter",
        "library_name": "peft",
        "pipeline_tag": "text-generation",
    }
    if facts.licence:
        metadata["license"] = facts.licence
    body = text
    if text.startswith("---\n") and "\n---" in text[4:]:
        head, _, body = text[4:].partition("\n---")
        try:
            given = yaml.safe_load(head) or {}
        except yaml.YAMLError as error:
            raise ValueError(f"The metadata of {CARD_NAME} are no YAML: {error}") from error
        if not isinstance(given, dict):
            raise ValueError(f"The metadata of {CARD_NAME} must be keys with values, not {type(given).__name__}.")
        metadata |= given
    tags = metadata.get("tags") or []
    metadata["tags"] = [*tags, *(tag for tag in TAGS if tag not in tags)]
    return f"---\n{yaml.safe_dump(metadata, sort_keys=True)}---\n\n{body.lstrip()}"


def _introduction(folder: Path, facts: CardFacts) -> str:
    return (
        f"# {facts.repository.split('/')[-1]}\n\n"
        f"Retention gates for [{facts.base_model}](https://huggingface.co/{facts.base_model}): they say, when a token "
        "is created, how long it is worth keeping in the KV cache, so that the cache has a fixed size however long "
        "the text. The base model's weights are unchanged."
    )


def _use(config: dict[str, Any], facts: CardFacts) -> str:
    name = facts.repository + (f"@{facts.revision}" if facts.revision else "")
    revisions = [
        f', revision="{value}"' if value else "" for value in (config.get("revision"), facts.revision)
    ]  # of the base, of the adapter
    return f"""## How to load

```python
import retention_gates  # pip install retention-gates; makes PEFT know the method
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

base = AutoModelForCausalLM.from_pretrained("{facts.base_model}"{revisions[0]})
tokenizer = AutoTokenizer.from_pretrained("{facts.base_model}"{revisions[0]})
model = PeftModel.from_pretrained(base, "{facts.repository}"{revisions[1]})
cache = retention_gates.BoundedCache(model, memory_size=256)  # entries per KV head, in the mean
inputs = tokenizer("Once upon a time", return_tensors="pt")
print(tokenizer.decode(model.generate(**inputs, past_key_values=cache, max_new_tokens=200)[0]))
```
```
retention-gates generate --adapter {name} --memory-size 256 "Once upon a time"
```"""


def _method(config: dict[str, Any]) -> str:
    kind = config["gate_type"]
    return f"""## Method

{SOURCES.get(kind, SOURCE)}. A gate in each attention layer reads the hidden state x of a token:

    {EQUATIONS[kind]}

one number per KV head. In training, attention at step t decays what token i says: softmax_i(q_t k_i scale +
(t - i) log_beta_i) v_i. In use, attention is plain, and when a KV head holds more than its budget after step t, the
entry with the smallest (t - i) log_beta_i is overwritten ({SOURCE})."""


def _gates(config: dict[str, Any], facts: CardFacts, size: int) -> str:
    layers = config["gated_layers"]
    rows = {
        "base model": f"{facts.base_model}" + (f", revision `{config['revision']}`" if config.get("revision") else ""),
        "gate": f"`{config['gate_type']}`"
        + ("" if config["gate_type"] == "linear" else f" of width {config['gate_width']}, {config['activation']}"),
        "gated layers": f"{len(layers)} ({layers[0]} to {layers[-1]})",
        "KV heads per layer": config["num_key_value_heads"],
        "hidden size": config["hidden_size"],
        "protected tokens": f"{config['protected_tokens']} at the start of each document",
        "weights": f"{size / 1e6:.1f} MB, SHA-256 with config `{config['weights_sha256']}`"
        if config.get("weights_sha256")
        else f"{size / 1e6:.1f} MB",
        "budgets": _budgets(config.get("budget_shares")),
    }
    return "## The gates\n\n| | |\n|---|---|\n" + "\n".join(f"| {name} | {value} |" for name, value in rows.items())


def _budgets(shares: list[list[float]] | None) -> str:
    if not shares:
        return "uniform: the adapter has not been calibrated"
    flat = sorted(share for row in shares for share in row)
    return (
        f"calibrated for any memory size (retained mass per head, in tokens: least {flat[0]:.1f}, median "
        f"{flat[len(flat) // 2]:.1f}, most {flat[-1]:.1f}), or uniform"
    )


def _training(run: Path, config: dict[str, Any]) -> str | None:
    """From the run's own files, if they lie beside the adapter's folder."""
    if not (run / RUN_FILE).is_file():
        return None
    try:
        recipe = yaml.safe_load((run / RUN_FILE).read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise ValueError(f"{run / RUN_FILE} is no YAML ({error}): the card takes the recipe from there.") from error
    if not _made(recipe, config):
        return None
    recipe["training"].pop("output_dir", None)
    sources = [each if isinstance(each, str) else each.get("source") for each in recipe["data"].get("sources", [])]
    text = "## Training\n\n"
    if sources:
        text += "Data: " + ", ".join(f"`{_portable(source)}`" for source in sources) + ". "
    text += f"The recipe:\n\n```yaml\n{yaml.safe_dump(_portable(recipe), sort_keys=False)}```"
    last = _last_log(run / LOG)
    if last:
        values = ", ".join(f"{name} {value:.4g}" for name, value in last.items() if name != "step")
        text += f"\n\nThe last log of training, at step {last['step']}: {values}."
    return text


def _made(recipe: Any, config: dict[str, Any]) -> bool:
    """Whether a recipe can be that of an adapter: the same base model and gates."""
    if not isinstance(recipe, dict) or not all(
        isinstance(recipe.get(name), dict) for name in ("model", "data", "training")
    ):
        return False
    gate = recipe.get("gate") or {}
    base, package = config.get("base_model_name_or_path") or "", recipe["model"].get("package")
    is_base = recipe["model"].get("name") == base if package is None else Path(base).name == package
    return is_base and all(config.get(name) == value for name, value in gate.items())


def _portable(value: Any) -> Any:
    """The value with the last part of each path of this machine only: the rest says nothing to others."""
    if isinstance(value, dict):
        return {key: _portable(each) for key, each in value.items()}
    if isinstance(value, list):
        return [_portable(each) for each in value]
    return without_folders(value) if isinstance(value, str) else value


def _last_log(path: Path) -> dict[str, float]:
    if not path.is_file():
        return {}
    wanted = ("step", "loss", "forward_kl", "next_token_loss", "layer_error", "capacity_loss", "learning_rate")
    logs = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            logs.append(json.loads(line))
        except json.JSONDecodeError:
            break  # the line that was being written when the process died
    trained = [log for log in logs if "loss" in log]
    return {name: trained[-1][name] for name in wanted if name in trained[-1]} if trained else {}


def _evaluation(evaluation: Path, folder: Path, facts: CardFacts) -> str:
    report = report_of(evaluation, folder, facts.repository)
    report = re.sub("^#", "##", report, flags=re.MULTILINE)  # its sections are parts of this one
    return f"## Evaluation\n\nUnder real eviction, as `retention-gates evaluate` measured it.\n\n{report}"


def _versions(config: dict[str, Any]) -> str:
    from retention_gates import __version__

    return f"## Versions\n\nSaved with PEFT {config.get('peft_version')}; card by retention-gates {__version__}."
