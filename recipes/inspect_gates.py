"""Draws what gates have learnt: how long each head keeps what, on average and on one text.

    retention-gates inspect --adapter out/adapter --memory-size 64 --output out/inspection

writes half_life.png, retained_mass.png, kept_tokens.png and tokens.html.
"""

import argparse
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from retention_gates.recipes.loading.arguments import add_model_arguments, add_text_arguments
from retention_gates.recipes.loading.models import base_name, load_model, load_tokenizer
from retention_gates.recipes.loading.output_folder import check_output, claim_output, replacing, write_text
from retention_gates.recipes.loading.rows import load_rows, load_token_documents
from retention_gates.recipes.report import plots
from retention_gates.recipes.report.token_page import token_page

if TYPE_CHECKING:
    import torch
    from torch import nn
    from transformers import PreTrainedTokenizerBase

HALF_LIFE, RETAINED_MASS, KEPT, PAGE = "half_life.png", "retained_mass.png", "kept_tokens.png", "tokens.html"
LONGEST_HALF_LIFE = 1e9  # tokens; anything longer is "for ever" in a picture


@dataclass
class Reading:
    """What the gates say of one text, and what a bounded cache does with it."""

    half_lives: "torch.Tensor"  # [layers, H, T], in tokens; infinite where protected
    eviction_times: "torch.Tensor"  # [layers, H, T], first step at which a token is no longer seen; T: never
    budgets: list[list[int]]  # [layers][H]

    @property
    def tokens(self) -> int:
        return self.half_lives.shape[-1]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model_arguments(parser, adapter_required=True)
    add_text_arguments(parser, rows=4, length=512, rows_option="--rows")
    parser.add_argument(
        "--show", type=Path, metavar="FILE", help="text file whose tokens are shown (default: a passage of --text)"
    )
    parser.add_argument(
        "--memory-size", type=int, default=64, metavar="M", help="entries kept per KV head, in the mean (default: 64)"
    )
    parser.add_argument(
        "--budgets", help="uniform, calibrated or pyramid (default: calibrated if the adapter has been, else uniform)"
    )
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="folder for the pictures")


def main(options: argparse.Namespace) -> None:
    check_output(options.output)
    if options.memory_size < 1:
        raise ValueError(f"--memory-size {options.memory_size} must be 1 or more.")
    plots.require_matplotlib()

    import torch

    from retention_gates.checkpoints.evaluation_files import without_folders
    from retention_gates.gates.adapter.base_identity import display_name
    from retention_gates.gates.adapter.model import find_gated_model
    from retention_gates.trainers.calibration import measure_shares

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
    with replacing(folder / HALF_LIFE) as temporary:
        title = f"Half-life of a token's retention\nmedian over {measured}"
        plots.heat_map(half_lives, temporary, layers=layers, title=title, label="half-life (tokens)")
    with replacing(folder / RETAINED_MASS) as temporary:
        title = f"Tokens that a head keeps alive\nmean over the later half of {measured}"
        plots.heat_map(masses, temporary, layers=layers, title=title, label="retained mass (tokens)")
    age = torch.arange(reading.tokens)
    with replacing(folder / KEPT) as temporary:
        plots.kept_tokens(
            reading.eviction_times - age,
            reading.eviction_times >= reading.tokens,
            temporary,
            layers=layers,
            title=f"What each head keeps of {reading.tokens} tokens, at {options.memory_size} entries on average",
        )
    words = [str(tokenizer.decode([token])) for token in shown.tolist()]
    page = token_page(
        words,
        reading.half_lives,
        reading.eviction_times,
        layers=layers,
        budgets=reading.budgets,
        title=f"{display_name(name, options.gguf_file)} at {options.memory_size} entries per head, gates of "
        f"{without_folders(options.adapter)}",
    )
    write_text(folder / PAGE, page)
    print(f"written: {', '.join(str(folder / file) for file in (HALF_LIFE, RETAINED_MASS, KEPT, PAGE))}")


def read_text(model: "nn.Module", ids: "torch.Tensor", *, memory_size: int, budgets: str | None) -> Reading:
    """Half-lives and eviction times of a text's tokens [T], as a bounded cache would see them step by step.

    Raises:
        ValueError: for a text too short to evict anything, or longer than the model's positions.
    """
    import torch

    from retention_gates.gates.adapter.gate import half_life
    from retention_gates.gates.adapter.model import find_gated_model
    from retention_gates.gates.simulation.simulated_cache import SimulatedCache
    from retention_gates.trainers.evaluation.forward_passes import check_length

    gated = find_gated_model(model)
    check_length(gated, len(ids))
    cache = SimulatedCache(gated, memory_size, budgets=budgets)
    said: list[torch.Tensor] = []  # log_beta [1, H, T] of each gated layer, in order

    def listen(gate: object, inputs: object, log_beta: torch.Tensor) -> None:
        said.append(log_beta[0].cpu())

    gates = [gate for layer in gated.gated_layers if (gate := layer.active_gate) is not None]
    hooks = [gate.register_forward_hook(listen) for gate in gates]
    try:
        with torch.no_grad():
            place = gated.model.get_input_embeddings().weight.device
            gated(input_ids=ids[None].to(place), past_key_values=cache, use_cache=True, last_hidden_state_only=True)
    finally:
        for hook in hooks:
            hook.remove()
    half_lives = half_life(torch.stack(said))
    half_lives[..., : gated.active_config.protected_tokens] = float("inf")
    times = torch.stack([layer.eviction_times[0].cpu() for layer in cache.gated_layers])
    if bool((times >= len(ids)).all()):
        raise ValueError(
            f"A memory of {memory_size} entries per head evicts none of {len(ids)} tokens: show a longer text, or "
            "choose a smaller --memory-size."
        )
    return Reading(half_lives, times, cache.budgets)


def median_half_lives(model: "nn.Module", rows: "torch.Tensor") -> "torch.Tensor":
    """Median half-life in tokens of unprotected tokens of the rows [R, T], as in training: [layers, H]."""
    import torch

    from retention_gates.gates.adapter.gate import half_life
    from retention_gates.gates.adapter.gate_outputs import record
    from retention_gates.gates.adapter.model import find_gated_model

    gated = find_gated_model(model)
    protected = gated.active_config.protected_tokens
    found = []  # [layers, H, T] of each row
    for row in rows:
        with torch.no_grad(), record(gated) as recording:
            ids = row[None].to(gated.model.get_input_embeddings().weight.device)
            gated(input_ids=ids, use_cache=False, last_hidden_state_only=True)
        found.append(torch.stack([half_life(log_beta[0, :, protected:]).cpu() for log_beta in recording.log_beta]))
    return torch.cat(found, dim=-1).clamp(max=LONGEST_HALF_LIFE).median(-1).values


def _tokens_of(file: Path, tokenizer: "PreTrainedTokenizerBase", length: int) -> "torch.Tensor":
    """The first `length` tokens of a text file, opened as the model's documents are."""
    import torch

    from retention_gates.data.tokens import document_prefix

    try:
        text = file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"--show {file} is not UTF-8 text ({error}): convert it first.") from error
    if not text.strip():
        raise ValueError(f"--show {file} is empty: name a file with some text.")
    ids = document_prefix(tokenizer) + tokenizer.encode(text, add_special_tokens=False, verbose=False)
    return torch.tensor(ids[:length])
