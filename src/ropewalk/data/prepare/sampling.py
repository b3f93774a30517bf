"""A bounded sample of a corpus: for training a tokenizer, choosing held-out documents, and filler."""

from __future__ import annotations

import heapq
from collections import Counter
from collections.abc import Iterable

from ropewalk.data.prepare.corpus import Document, Unit, read_documents
from ropewalk.data.store.hashing import stable_key

SAMPLE_BYTES = 2**27  # of text, held in memory; a smaller corpus is taken whole


def sample_documents(units: Iterable[Unit]) -> list[Document]:
    """Documents in corpus order: those whose names hash lowest, until they have 128 MB together.

    What they are does not depend on the order in which the corpus is read.
    """
    chosen: list[tuple[int, int, int, Document]] = []  # a heap, the highest hash first
    size = 0
    skipped: Counter[str] = Counter()  # counted where the corpus is tokenized
    place = 0
    for unit in units:
        for document in read_documents(unit, skipped):
            heapq.heappush(chosen, (-stable_key("sample", document.name), -place, document.bytes, document))
            place += 1
            size += document.bytes
            while size - chosen[0][2] >= SAMPLE_BYTES:
                size -= heapq.heappop(chosen)[2]
    return [document for _, _, _, document in sorted(chosen, key=lambda entry: -entry[1])]
