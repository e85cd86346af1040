"""Scores memories of bounded size on text, exactly as a bounded cache would evict, without decoding.

Every score comes from one forward pass through a `SimulatedCache`, several contenders side by side: what each head
holds at every step is what a token-by-token decode with `BoundedCache` would hold. The full cache is the base model
itself, gates off.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from retention_gates.gates.adapter.model import find_gated_model
from retention_gates.trainers.evaluation.contenders import Contender, name_of
from retention_gates.trainers.evaluation.forward_passes import (
    Progress,
    Records,
    check_length,
    hidden_states,
    row_seeds,
)
from retention_gates.trainers.output_head import OutputHead

TEXT = "text"


# tokens whose logits exist at a time, on a CPU and on a GPU: with the largest vocabulary, 256 are 256 MiB in fp32
LOGITS_CHUNK = (256, 2048)


@torch.no_grad()
def compare_rows(
    model: nn.Module,
    rows: torch.Tensor,
    chosen: Sequence[Contender],
    *,
    start: int = 0,
    batch_size: int = 1,
    seed: int | Sequence[int] = 0,
    progress: Progress = lambda count: None,
    found: Callable[[Records], Any] = lambda records: None,
) -> Records:
    """Measures each contender's loss to the full cache on text: one record per row and contender, the full cache too.

    A record has `kl`, the mean KL(full || contender) in nats per token; `nll` and `full_nll`, the mean negative log
    likelihood of the next token; and `agreement`, the share of tokens whose most likely successor is the same.

    Args:
        rows: token ids [R, T], one document each.
        start: the first position whose forecast counts.
        seed: of policies that draw by chance, for all rows or for each one.
        found: is given what is known after each forward pass, all records of some contenders and rows.

    Raises:
        ValueError: for rows that the model has no positions for, or too short to score.
    """
    gated = find_gated_model(model)
    length = rows.shape[1]
    check_length(gated, length)
    if not 0 <= start < length - 1:
        raise ValueError(
            f"start={start} leaves nothing to score in rows of {length} tokens: choose 0 to {length - 2}."
        )
    head = OutputHead.from_model(model)
    records: Records = []
    for first in range(0, len(rows), batch_size):
        ids = rows[first : first + batch_size].to(head.device)
        targets, full = ids[:, start + 1 :], None
        for some, kept in hidden_states(model, ids, chosen, row_seeds(seed, range(first, first + len(ids))), progress):
            if full is None:
                full = kept[0]
            scores = _score_text(head, full[:, start:], [hidden[:, start:] for hidden in kept], targets)
            new = [
                {"task": TEXT, "row": first + row, **name_of(contender)}
                | {name: scores[name][index, row].item() for name in ("kl", "nll", "agreement")}
                | {"full_nll": scores["full_nll"][row].item()}
                for index, contender in enumerate(some)
                for row in range(len(ids))
            ]
            found(new)
            records += new
    return sorted(records, key=lambda record: record["row"])


def _score_text(
    head: OutputHead, full: torch.Tensor, kept: Sequence[torch.Tensor], targets: torch.Tensor
) -> dict[str, torch.Tensor]:
    """Means over the tokens of each row: full_nll [B]; kl, nll and agreement [contenders, B].

    Args:
        full: hidden states [B, T, C]; kept: the same for each contender.
        targets: [B, T - 1], the next tokens; the last position has a forecast but no target.
    """
    batch, tokens = full.shape[:2]
    step = max(1, LOGITS_CHUNK[full.device.type == "cuda"] // batch)
    sums = {name: full.new_zeros(len(kept), batch, dtype=torch.float64) for name in ("kl", "nll", "agreement")}
    full_nll = full.new_zeros(batch, dtype=torch.float64)
    for first in range(0, tokens, step):
        here = slice(first, first + step)
        expected = targets[:, here, None]
        teacher = head.logits(full[:, here]).log_softmax(-1)  # [B, step, V]
        probabilities, most_likely = teacher.exp(), teacher.argmax(-1)
        full_nll -= teacher[:, : expected.shape[1]].gather(-1, expected).sum((1, 2))
        for index, hidden in enumerate(kept):
            student = head.logits(hidden[:, here]).log_softmax(-1)
            sums["nll"][index] -= student[:, : expected.shape[1]].gather(-1, expected).sum((1, 2))
            sums["agreement"][index] += (student.argmax(-1) == most_likely).sum(1)
            # in the student's memory: [B, step, V] is what limits a chunk
            sums["kl"][index] += torch.linalg.vecdot(probabilities, torch.sub(teacher, student, out=student)).sum(1)
    counts = {"kl": tokens, "nll": tokens - 1, "agreement": tokens}
    return {name: total / counts[name] for name, total in sums.items()} | {"full_nll": full_nll / (tokens - 1)}
