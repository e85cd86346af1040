"""Documents as token ids."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase

from retention_gates.data.chat import encode_chat
from retention_gates.data.files import BadRow, OnBadRow, check_text
from retention_gates.data.sources import Document

DOCUMENT_SEPARATOR = "<|endoftext|>"


@dataclass(frozen=True)
class TokenDocument:
    """The tokens of one document, of a text with `document_prefix`, and which of them are targets."""

    work: str
    ids: np.ndarray  # int32 [n]
    targets: np.ndarray | None = None  # bool [n]; None: all of them
    turns: int = 0  # the assistant's turns of a chat that are targets here
    lost_turns: int = 0  # those of the chat that are targets nowhere, counted at its first document
    is_repeat: bool = False  # whether its text, but the last turn, stands in an earlier document of the chat, too


def document_prefix(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Ids that open a document: what the tokenizer puts in front by itself, else `<|endoftext|>` if it knows it.

    Models are pretrained on documents that begin this way and attend to this first token when they look for nothing;
    tokenizers such as SmolLM2's and Qwen's know the separator but add nothing.
    """
    bare = tokenizer.encode("a", add_special_tokens=False)
    full = tokenizer.encode("a")
    for start in range(len(full) - len(bare) + 1):
        if full[start : start + len(bare)] == bare and start > 0:
            return full[:start]
    separator = tokenizer.convert_tokens_to_ids(DOCUMENT_SEPARATOR)
    # An unknown word gives None or the id of the unknown token, which may itself be the separator.
    if isinstance(separator, int) and tokenizer.convert_ids_to_tokens(separator) == DOCUMENT_SEPARATOR:
        return [separator]
    return []


def tokenize_documents(
    documents: Sequence[Document], tokenizer: PreTrainedTokenizerBase, *, batch_size: int = 64, progress: bool = True
) -> list[TokenDocument]:
    """Token ids of texts and chats, in order; in chats only the assistant's turns are targets.

    A chat is several documents where the template rewrites earlier turns; see `render_turns`.

    Args:
        batch_size: texts handed to the tokenizer at a time.
        progress: show a progress bar.
    """
    if not documents:
        raise ValueError("there are no documents to tokenise: the data set is empty")
    result: list[TokenDocument] = []
    with tqdm(total=len(documents), desc="tokenising", unit="doc", disable=not progress, delay=1) as bar:
        for start in range(0, len(documents), batch_size):
            batch = documents[start : start + batch_size]
            result += tokenize_batch(batch, tokenizer)
            bar.update(len(batch))
    return result


def tokenize_batch(
    batch: Sequence[Document], tokenizer: PreTrainedTokenizerBase, *, on_bad_row: OnBadRow | None = None
) -> list[TokenDocument]:
    """As `tokenize_documents`, all at once; `on_bad_row` gets what is wrong with a document that is then left out."""
    prefix = document_prefix(tokenizer)
    texts = [document.text for document in batch if document.text is not None]
    try:
        encoded = iter(_encode(texts, tokenizer))
    except Exception:  # the fault of some texts, each to be tokenised alone
        encoded = None
    result = []
    for document in batch:
        place = document.place or repr(document.work)
        try:
            if document.messages is None:
                assert document.text is not None
                ids = _encode_alone(document.text, tokenizer, place) if encoded is None else next(encoded)
                result.append(TokenDocument(document.work, np.array(prefix + ids, dtype=np.int32)))
            else:
                result += _chat_documents(document, tokenizer, place)
        except BadRow as error:
            if on_bad_row is None:
                raise
            on_bad_row(str(error))
    return result


def _chat_documents(document: Document, tokenizer: PreTrainedTokenizerBase, place: str) -> list[TokenDocument]:
    assert document.messages is not None
    rows = encode_chat(document.messages, tokenizer, place=place)
    turns = sum(message["role"] == "assistant" for message in document.messages)
    lost = max(0, turns - sum(row.turns for row in rows))
    documents = []
    for index, row in enumerate(rows):
        ids, told = np.array(row.ids, dtype=np.int32), min(row.turns, turns)
        is_repeat, lost_turns = index > 0, lost if index == 0 else 0
        documents.append(TokenDocument(document.work, ids, row.targets, told, lost_turns, is_repeat))
    return documents


def _encode(texts: list[str], tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    # verbose=False: a document longer than the model's positions is fine here, it is cut into rows later.
    return list(tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]) if texts else []


def _encode_alone(text: str, tokenizer: PreTrainedTokenizerBase, place: str) -> list[int]:
    check_text(text, place)
    try:
        return _encode([text], tokenizer)[0]
    except Exception as error:  # of any kind, as the tokenizer pleases
        raise BadRow(f"{place} cannot be tokenised ({type(error).__name__}: {error})") from error
