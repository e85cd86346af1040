"""From which checkpoint a run goes on."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from retention_gates.trainers import checkpoint
from retention_gates.trainers.config import RetentionTrainingArguments
from retention_gates.trainers.distributed.first_rank import on_first_rank
from retention_gates.trainers.distributed.layout import check_same_run
from retention_gates.trainers.run_folder.inputs import check_same_inputs


def find_start(
    wanted: str | bool | None,
    args: RetentionTrainingArguments,
    facts: dict[str, Any],
    barrier: Callable[[], Any],
) -> Path | None:
    """The checkpoint to go on from, None for a run that begins. Every rank calls.

    Args:
        wanted: what `train` got: False or None to begin, True for the last whole checkpoint, or a path.
        facts: of the run, as its checkpoints note them.

    Raises:
        ValueError: if there is none, if it was written by another kind of run, or if output_dir holds checkpoints and
            none was asked for.
    """
    output_dir = Path(str(args.output_dir))
    if args.should_save:
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
        source = checkpoint.last_checkpoint(output_dir, is_writer=args.should_save, barrier=barrier)
    else:
        source = Path(wanted)
    if source is None:
        raise ValueError(f"There is no checkpoint in {output_dir} to resume from: train without resuming.")
    manifest = checkpoint.read_manifest(source)
    check_same_run(source, manifest, facts)
    on_first_rank(args, lambda: check_same_inputs(source, manifest, facts["inputs"]))
    return source
