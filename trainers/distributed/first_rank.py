"""Work of the first rank whose failure ends all ranks."""

from collections.abc import Callable
from typing import Any

from accelerate.utils import broadcast_object_list
from transformers import TrainingArguments


def on_first_rank(args: TrainingArguments, work: Callable[[], Any]) -> None:
    """Runs `work` on the first rank while the others wait; what it raises is raised on every rank.

    Raises:
        ValueError: on the others, with the first rank's message.
    """
    failure: list[str | None] = [None]
    error = None
    if args.process_index == 0:
        try:
            work()
        except Exception as caught:
            error, failure = caught, [str(caught) or type(caught).__name__]
    if args.world_size > 1:
        broadcast_object_list(failure, from_process=0)
    if error is not None:
        raise error
    if failure[0] is not None:
        raise ValueError(f"The first rank: {failure[0]}")
