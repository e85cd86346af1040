"""Tokenizers with another chat template, and what of a chat is a target."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from retention_gates.data.chat import encode_chat

CONTROL = [
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<think>",
    "</think>",
    "<|user|>",
    "<|assistant|>",
    "<|end|>",
]
CONTROL += ["<|channel|>", "<|message|>", "<|return|>"]


def byte_tokenizer(*, swallows: bool = False) -> PreTrainedTokenizerFast:
    """Bytes, runs of white space and control tokens, which may take the white space behind them."""
    pieces = [*sorted(pre_tokenizers.ByteLevel.alphabet()), "ĊĊ", "ĊĊĊ", "ĠĠ", "the", "th"]
    merges = [("Ċ", "Ċ"), ("ĊĊ", "Ċ"), ("Ġ", "Ġ"), ("t", "h"), ("th", "e")]
    bpe = Tokenizer(models.BPE(vocab={piece: i for i, piece in enumerate(pieces)}, merges=merges))
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    bpe.decoder = decoders.ByteLevel()
    bpe.add_special_tokens([AddedToken(word, rstrip=swallows, special=True) for word in CONTROL])
    return PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="<|im_end|>", pad_token="<|im_end|>")


def with_template(tokenizer: PreTrainedTokenizerFast, template: str | None) -> PreTrainedTokenizerFast:
    """The tokenizer with that chat template, and none of its own special tokens' names."""
    other = PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer)
    other.chat_template = template
    return other


def one_row(messages: list[dict], tokenizer: PreTrainedTokenizerFast) -> tuple[list[int], np.ndarray]:
    """Tokens and targets of a chat that is one row."""
    (row,) = encode_chat(messages, tokenizer)
    return row.ids, row.targets


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
