"""Draws what the gates have learnt: retained mass per layer and head, and the half-lives of tokens."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn
from transformers import TrainerCallback
from transformers.integrations import TensorBoardCallback
from transformers.integrations.integration_utils import TrackioCallback

from retention_gates.compat import trackio_of
from retention_gates.gates.adapter.gate import half_life
from retention_gates.gates.adapter.gate_outputs import record
from retention_gates.gates.adapter.model import find_gated_model
from retention_gates.gates.adapter.modes import evaluating
from retention_gates.gates.cache.budgets import RetainedMass

EDGES = np.arange(0.0, 20.5, 0.5)  # of the histogram, in log2 of tokens; tokens beyond count in the outermost bins
CELL, WIDTH = 12, 240  # pixels: of a cell at least, and of a picture; with few heads, cells are wider than high
COLOURS = np.array([[16, 18, 48], [62, 40, 120], [160, 50, 110], [235, 110, 60], [252, 230, 150]])


@dataclass
class Portrait:
    retained_mass: np.ndarray  # [gated layers, KV heads], mean entries of the row's later half
    half_lives: np.ndarray  # counts of tokens between EDGES, protected ones left out

    def heat_map(self) -> np.ndarray:
        """uint8 [height, width, 3]: a row of cells for each layer, a column for each head, bright for much mass."""
        mass = np.log2(self.retained_mass + 1)
        scaled = mass / max(mass.max(), 1e-9)
        places = np.linspace(0, 1, len(COLOURS))
        cells = np.stack([np.interp(scaled, places, channel) for channel in COLOURS.T], axis=-1)
        across = max(CELL, WIDTH // mass.shape[1])
        return cells.repeat(CELL, axis=0).repeat(across, axis=1).astype(np.uint8)


@torch.no_grad()
def portray(model: nn.Module, row: torch.Tensor) -> Portrait:
    """Looks at one row [T], a document of its own; with a sharded model, on all ranks."""
    gated = find_gated_model(model)
    device = gated.model.get_input_embeddings().weight.device
    with evaluating(gated), record(gated) as recording:
        model(input_ids=row[None].to(device), use_cache=False, last_hidden_state_only=True)
    mass = RetainedMass(first_step=len(row) // 2)
    mass.add(recording.log_beta, recording.document_ids)
    lives = torch.cat([half_life(layer[layer < 0]).log2().cpu() for layer in recording.log_beta]).numpy()
    counts, _ = np.histogram(lives.clip(EDGES[0], EDGES[-1]), bins=EDGES)
    return Portrait(np.array(mass.shares()), counts)


def show(portrait: Portrait, trackers: Sequence[TrainerCallback], step: int) -> None:
    """Hands the pictures to tensorboard and trackio, where the run reports to them."""
    for tracker in trackers:
        if isinstance(tracker, TensorBoardCallback) and tracker.tb_writer is not None:
            tracker.tb_writer.add_image("retained_mass", portrait.heat_map(), step, dataformats="HWC")
            _add_histogram(tracker.tb_writer, portrait, step)
        if isinstance(tracker, TrackioCallback) and (library := trackio_of(tracker)) is not None:
            pictures = {
                "retained_mass_map": library.Image(portrait.heat_map(), caption="layers down, heads across"),
                "log2_half_life": library.Histogram(np_histogram=(portrait.half_lives, EDGES)),
            }
            library.log(pictures, step=step)


def _add_histogram(writer: object, portrait: Portrait, step: int) -> None:
    middles = (EDGES[1:] + EDGES[:-1]) / 2
    counts = portrait.half_lives
    writer.add_histogram_raw(  # type: ignore[attr-defined]
        "log2_half_life",
        min=EDGES[0],
        max=EDGES[-1],
        num=int(counts.sum()),
        sum=float((counts * middles).sum()),
        sum_squares=float((counts * middles**2).sum()),
        bucket_limits=EDGES[1:].tolist(),
        bucket_counts=counts.tolist(),
        global_step=step,
    )
