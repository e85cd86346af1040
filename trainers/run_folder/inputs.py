"""The inputs of a run: a checkpoint notes them, and a resumed run is refused if they are not the same."""

import hashlib
import logging
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from retention_gates.data.document_facts import OfDocuments
from retention_gates.gates.adapter.base_identity import fingerprint
from retention_gates.gates.adapter.families import text_config
from retention_gates.gates.adapter.model import find_gated_model
from retention_gates.trainers.distributed.sharding import gathered, whole
from retention_gates.trainers.rows import COLUMNS

ROWS, EVAL_ROWS, BASE = "training rows", "evaluation rows", "base model"
SAMPLED = 256  # rows of a data set that does not know its documents, spread over it
MOST_NAMED = 5  # works

logger = logging.getLogger(__name__)


def inputs_of(model: nn.Module, train_dataset: Any, eval_dataset: torch.Tensor | None) -> dict[str, Any]:
    """Facts of the training rows, the evaluation rows and the base model. Every rank has to call.

    They are None where they cannot be told: for rows that are others at every look.
    """
    gated = find_gated_model(model)
    rope_parameters = getattr(text_config(gated.model), "rope_parameters", None)
    return {
        ROWS: row_facts(train_dataset),
        EVAL_ROWS: {"digest": None if eval_dataset is None else _digest(eval_dataset)},
        BASE: {"digest": fingerprint(_Whole(gated.model), rope_parameters)},
    }


def row_facts(rows: Any) -> dict[str, Any] | None:
    """Of the documents that rows are cut from; of rows that do not know them, their number and a digest of some."""
    if isinstance(rows, OfDocuments):
        return rows.document_facts()
    count = len(rows)
    chosen = sorted({i * (count - 1) // max(1, SAMPLED - 1) for i in range(SAMPLED)})
    digests = [_digest(rows[i]) for i in chosen]
    if _digest(rows[chosen[0]]) != digests[0]:
        return None
    return {"rows": count, "digest": hashlib.sha256(" ".join(digests).encode()).hexdigest()}


def check_same_inputs(checkpoint: Path, manifest: dict[str, Any], inputs: dict[str, Any]) -> None:
    """Raises ValueError if the checkpoint's run read something else, saying what; warns if that cannot be told."""
    unknown, changed = [], []
    for name, now in inputs.items():
        before = manifest.get("inputs", {}).get(name)
        if before is None or now is None:
            unknown.append(name)
        elif before["digest"] != now["digest"]:
            changed.append(f"the {name} ({_difference(before, now)})")
    if changed:
        raise ValueError(
            f"{checkpoint} was written by a run that read something else: {' and '.join(changed)} changed. The run "
            "would not be the same one: put back what was there, or start anew in another output_dir."
        )
    if unknown:
        logger.warning(
            "%s does not say, or it cannot be told, whether the %s are those of the run that wrote it: checkpoints "
            "note it since this version, and rows that are others at every look have no digest. The run goes on.",
            *(checkpoint, " and the ".join(unknown)),
        )


def _difference(before: dict[str, Any], now: dict[str, Any]) -> str:
    """In words: how many documents there were, and which works are new, gone or other."""
    if "documents" not in before or "documents" not in now:
        sizes = [f"{facts['rows']:,} rows, " if "rows" in facts else "" for facts in (before, now)]
        return f"{sizes[0]}digest {_short(before)} then, {sizes[1]}{_short(now)} now"
    then, later = (f"{facts['documents']:,} documents of {facts['tokens']:,} tokens" for facts in (before, now))
    text = f"{then} then, {later} now"
    old, new = before["works"], now["works"]
    if not (old and new):
        return text
    kinds = {
        "new": [work for work in new if work not in old],
        "gone": [work for work in old if work not in new],
        "with other content": [work for work in new if work in old and new[work] != old[work]],
    }
    for kind, works in kinds.items():
        if works:
            more = f" and {len(works) - MOST_NAMED} more" if len(works) > MOST_NAMED else ""
            text += f"; {kind}: {', '.join(map(repr, works[:MOST_NAMED]))}{more}"
    return text


def _short(facts: dict[str, Any]) -> str:
    return str(facts["digest"])[:16]


def _digest(row: Any) -> str:
    """Of a tensor, or of a row's columns."""
    tensors = [row[name] for name in COLUMNS if name in row] if isinstance(row, Mapping) else [row]
    digest = hashlib.sha256()
    for tensor in (torch.as_tensor(tensor).to("cpu", torch.int64) for tensor in tensors):
        digest.update(f"{list(tensor.shape)} ".encode() + tensor.contiguous().numpy().tobytes())
    return digest.hexdigest()


class _Whole:
    """A model's parameters one by one, each put together from all ranks where they share it."""

    def __init__(self, model: nn.Module):
        self.model = model

    def named_parameters(self) -> Iterator[tuple[str, torch.Tensor]]:
        for name, parameter in self.model.named_parameters():
            if ".retention_gate." in name:
                continue
            with gathered([parameter]):
                yield name, whole(parameter.detach())
