"""Tokenizers with another chat template, and what of a chat is a target."""

from collections.abc import Sequence
from typing import Any

from transformers import PreTrainedTokenizerFast


def with_template(tokenizer: PreTrainedTokenizerFast, template: str | None) -> PreTrainedTokenizerFast:
    """The tokenizer with that chat template, and none of its own special tokens' names."""
    other = PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer)
    other.chat_template = template
    return other


def target_texts(ids: Sequence[int], targets: Any, tokenizer: PreTrainedTokenizerFast) -> list[str]:
    """The text of each run of targets."""
    runs: list[list[int]] = []
    previous = False
    for token, is_target in zip(ids, targets.tolist(), strict=True):
        if is_target and not previous:
            runs.append([])
        if is_target:
            runs[-1].append(token)
        previous = is_target
    return [tokenizer.decode(run) for run in runs]
