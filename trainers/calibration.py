"""Measures how many tokens each head keeps alive; calibrated budgets are in proportion to it."""

import torch
from torch import nn

from retention_gates.gates.adapter.gate_outputs import record
from retention_gates.gates.adapter.model import find_gated_model
from retention_gates.gates.adapter.modes import evaluating
from retention_gates.gates.cache.budgets import RetainedMass

ROWS_AT_A_TIME = 4


@torch.no_grad()
def measure_shares(model: nn.Module, rows: torch.Tensor) -> list[list[float]]:
    """Mean retained mass in tokens over the later half of each row [R, T]: [gated layers][KV heads]."""
    gated = find_gated_model(model)
    device = gated.model.get_input_embeddings().weight.device
    mass = RetainedMass(first_step=rows.shape[1] // 2)
    for some in rows.to(device).split(ROWS_AT_A_TIME):
        with evaluating(gated), record(gated) as recording:
            model(input_ids=some, use_cache=False, last_hidden_state_only=True)
        mass.add(recording.log_beta, recording.document_ids)
    return mass.shares()
