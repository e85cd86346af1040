"""From which checkpoint a run goes on."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from retention_gates.trainers import checkpoint
from retention_gates.trainers.distributed.layout import check_same_run


def find_start(
    wanted: str | bool | None,
    output_dir: Path,
    facts: dict[str, Any],
    *,
    is_writer: bool = True,
    barrier: Callable[[], Any] = lambda: None,
) -> Path | None:
    """The checkpoint to go on from, None for a run that begins. Every rank calls.

    Args:
        wanted: what `train` got: False or None to begin, True for the last whole checkpoint, or a path.
        facts: of the run, as its checkpoints note them.

    Raises:
        ValueError: if there is none, if it was written by another kind of run, or if output_dir holds checkpoints and
            none was asked for.
    """
    if is_writer:
        checkpoint.remove_unfinished(output_dir)
    barrier()
    if not wanted:
        if found := checkpoint.checkpoints_in(output_dir):
            raise ValueError(
                f"{output_dir} holds the checkpoints of an earlier run, {found[-1].name} the last: resume with "
                "train(resume_from_checkpoint=True), or choose another output_dir."
            )
        return None
    if wanted is True:
        source = checkpoint.last_checkpoint(output_dir, is_writer=is_writer, barrier=barrier)
    else:
        source = Path(wanted)
    if source is None:
        raise ValueError(f"There is no checkpoint in {output_dir} to resume from: train without resuming.")
    check_same_run(source, checkpoint.read_manifest(source), facts)
    return source
