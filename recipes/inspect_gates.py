"""Draws what gates have learnt: how long each head keeps what, on average and on one text.

    retention-gates inspect --adapter out/adapter --memory-size 64 --output out/inspection

writes half_life.png, retained_mass.png, kept_tokens.png and tokens.html.
"""

import argparse
from pathlib import Path

import torch
from transformers import PreTrainedTokenizerBase

from retention_gates.checkpoints.evaluation_files import without_folders
from retention_gates.data.tokens import document_prefix
from retention_gates.gates.adapter.base_identity import display_name
from retention_gates.gates.adapter.model import find_gated_model
from retention_gates.recipes.loading.models import base_name, load_model, load_tokenizer
from retention_gates.recipes.loading.output_folder import check_output, claim_output, replacing, write_text
from retention_gates.recipes.loading.rows import load_rows, load_token_documents
from retention_gates.recipes.report import gate_maps
from retention_gates.recipes.report.figures import require_matplotlib, save_png
from retention_gates.recipes.report.gate_reading import median_half_lives, read_text, telling_head
from retention_gates.recipes.report.token_page import token_page
from retention_gates.trainers.calibration import measure_shares

HALF_LIFE, RETAINED_MASS, KEPT, PAGE = "half_life.png", "retained_mass.png", "kept_tokens.png", "tokens.html"


def main(options: argparse.Namespace) -> None:
    check_output(options.output)
    if options.memory_size < 1:
        raise ValueError(f"--memory-size {options.memory_size} must be 1 or more.")
    require_matplotlib()

    name = base_name(options.model, options.adapter)
    tokenizer = load_tokenizer(name, gguf_file=options.gguf_file)
    rows = load_rows(options, tokenizer, load_token_documents(options, tokenizer))
    shown = rows[0] if options.show is None else _tokens_of(options.show, tokenizer, options.length)
    model = load_model(name, options.adapter, gguf_file=options.gguf_file, device=options.device, dtype=options.dtype)
    reading = read_text(model, shown, memory_size=options.memory_size, budgets=options.budgets)
    half_lives = median_half_lives(model, rows)
    masses = torch.tensor(measure_shares(model, rows))

    layers = find_gated_model(model).active_config.gated_layers
    assert layers is not None
    folder = claim_output(options.output)
    measured = f"{len(rows)} passage{'s' * (len(rows) > 1)} of {rows.shape[1]} tokens"
    age = torch.arange(reading.tokens)
    pictures = {
        HALF_LIFE: gate_maps.heat_map(
            half_lives,
            layers=layers,
            title=f"Half-life of a token's retention\nmedian over {measured}",
            label="half-life (tokens)",
        ),
        RETAINED_MASS: gate_maps.heat_map(
            masses,
            layers=layers,
            title=f"Tokens that a head keeps alive\nmean over the later half of {measured}",
            label="retained mass (tokens)",
        ),
        KEPT: gate_maps.kept_tokens(
            reading.eviction_times - age,
            reading.eviction_times >= reading.tokens,
            layers=layers,
            title=f"What each head keeps of {reading.tokens} tokens, at {options.memory_size} entries on average",
        ),
    }
    for file, picture in pictures.items():
        with replacing(folder / file) as temporary:
            save_png(picture, temporary, gate_maps.DPI)
    words = [str(tokenizer.decode([token])) for token in shown.tolist()]
    page = token_page(
        words,
        reading.half_lives,
        reading.eviction_times,
        layers=layers,
        budgets=reading.budgets,
        opens_on=telling_head(reading),
        memory_size=options.memory_size,
        title=f"{display_name(name, options.gguf_file)}, gates of {without_folders(options.adapter)}",
    )
    write_text(folder / PAGE, page)
    print(f"written: {', '.join(str(folder / file) for file in (HALF_LIFE, RETAINED_MASS, KEPT, PAGE))}")


def _tokens_of(file: Path, tokenizer: "PreTrainedTokenizerBase", length: int) -> "torch.Tensor":
    """The first `length` tokens of a text file, opened as the model's documents are."""
    try:
        text = file.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"--show {file} is not UTF-8 text ({error}): convert it first.") from error
    if not text.strip():
        raise ValueError(f"--show {file} is empty: name a file with some text.")
    ids = document_prefix(tokenizer) + tokenizer.encode(text, add_special_tokens=False, verbose=False)
    return torch.tensor(ids[:length])
