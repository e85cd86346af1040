"""Facts about a run's documents, in a form that a checkpoint can hold and a later start can compare."""

import hashlib
from collections.abc import Sequence
from typing import Any, Protocol, runtime_checkable

import numpy as np

from retention_gates.data.tokens import TokenDocument

MOST_WORKS = 500  # whose digests are noted one by one


@runtime_checkable
class OfDocuments(Protocol):
    """Rows that know which documents they are cut from."""

    def document_facts(self) -> dict[str, Any]: ...


def document_facts(documents: Sequence[TokenDocument]) -> dict[str, Any]:
    """Numbers of documents and tokens, a digest of all in their order, and one of each work where there are not many.

    Digests are hexadecimal digits of SHA-256 over token ids and targets.
    """
    everything = hashlib.sha256()
    works: dict[str, Any] = {}
    for document in documents:
        ids = np.ascontiguousarray(document.ids, dtype=np.int64).tobytes()
        targets = b"all" if document.targets is None else np.packbits(document.targets).tobytes()
        content = b"%d %d " % (len(ids), len(targets)) + ids + targets
        everything.update(content)
        if document.work in works or len(works) <= MOST_WORKS:
            works.setdefault(document.work, hashlib.sha256()).update(content)
    facts = {"documents": len(documents), "tokens": sum(len(document.ids) for document in documents)}
    named = {work: digest.hexdigest()[:16] for work, digest in works.items()} if len(works) <= MOST_WORKS else {}
    return {**facts, "digest": everything.hexdigest(), "works": named}
