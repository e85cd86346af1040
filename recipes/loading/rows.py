"""Rows of text for the commands, as their arguments say."""

import argparse

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from retention_gates.data.packing import sample_windows
from retention_gates.data.sources import load_documents, split_by_work, stream_documents
from retention_gates.data.tokens import TokenDocument, document_prefix, tokenize_documents
from retention_gates.gates.policies.eviction_rule import MOST_SEED

DOCUMENTS_AT_A_TIME, PASSAGES_TO_CHOOSE_FROM = 64, 4


def load_token_documents(
    options: argparse.Namespace, tokenizer: "PreTrainedTokenizerBase", *, training_works: bool = False
) -> "list[TokenDocument]":
    """Tokenised documents as the text arguments say; of a large data set only as many as the passages need.

    Args:
        training_works: take the works that --test-fraction or --test-works leaves for training, not the others.
    """

    if not 0 <= options.seed <= MOST_SEED:
        raise ValueError(f"--seed {options.seed} must be from 0 to {MOST_SEED}.")
    documents = load_documents(
        options.text,
        split=options.split,
        subset=options.subset,
        text_field=options.text_field,
        work_field=options.work_field,
        seed=options.seed,
    )
    if options.test_fraction is not None or options.test_works is not None:
        train, test = split_by_work(
            documents, test_fraction=options.test_fraction, test_works=options.test_works, seed=options.split_seed
        )
        documents = train if training_works else test
    tokenized: list[TokenDocument] = []
    for first in range(0, len(documents), DOCUMENTS_AT_A_TIME):
        tokenized += tokenize_documents(documents[first : first + DOCUMENTS_AT_A_TIME], tokenizer)
        if (
            sum(len(document.ids) // max(1, options.length) for document in tokenized)
            > PASSAGES_TO_CHOOSE_FROM * options.rows
        ):
            break
    return tokenized


def calibration_rows(
    source: str, tokenizer: "PreTrainedTokenizerBase", rows: int, length: int, seed: int
) -> "torch.Tensor":
    """Token ids [rows, length] of texts or chats, one after the other where they are shorter.

    Raises:
        ValueError: if the source has fewer tokens.
    """
    prefix = document_prefix(tokenizer)
    found: list[np.ndarray] = []
    tokens = 0
    for document in stream_documents(source, seed=seed):
        found += [each.ids for each in tokenize_documents([document], tokenizer, progress=False)]
        tokens = sum(len(ids) for ids in found)
        if tokens > rows * length:
            break
    if tokens <= rows * length:
        raise ValueError(f"{source} has {tokens} tokens, where {rows} rows of {length} are wanted: name more texts.")
    whole = TokenDocument(source, np.concatenate(found))
    return sample_windows([whole], length, rows, seed=seed, prefix_ids=prefix)


def load_rows(
    options: argparse.Namespace, tokenizer: "PreTrainedTokenizerBase", documents: "list[TokenDocument]"
) -> "torch.Tensor":
    """Token ids [rows, length] of passages that don't overlap, works taking turns."""

    prefix = document_prefix(tokenizer)
    return sample_windows(documents, options.length, options.rows, seed=options.seed, prefix_ids=prefix)
