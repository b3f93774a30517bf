"""From tokenized documents to the domains of a store, every token accounted for."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ropewalk.data.packing import cut, pack, packed_sequences, whole_sequences
from ropewalk.data.store import PackedSequence
from ropewalk.data.writer import Accounting


@dataclass(frozen=True)
class DomainSource:
    """What is to be written as one domain."""

    sequences: Iterable[PackedSequence]
    accounting: Accounting

    @property
    def tokens(self) -> int:
        """Tokens to pack."""
        return self.accounting.tokens_in - sum(self.accounting.moved.values())


def corpus_domains(documents: Sequence[NDArray[np.uint32]], length: int, seed: int) -> dict[str, DomainSource]:
    """The domains ``long`` and ``short`` of a corpus.

    ``long`` has the documents of at least ``length`` tokens, cut into sequences of one document each; what is
    left of them goes to ``short``, packed with the shorter documents.

    Args:
        documents: tokens of each, uint32.
        length: tokens of a sequence.
        seed: of the order of the packed sequences.
    """
    lengths = np.array([len(document) for document in documents], dtype=np.int64)
    whole, rest = cut(lengths, length)
    bins = pack(rest.length, length, "short", seed)
    is_long = lengths >= length
    in_long, in_short = int(lengths[is_long].sum()), int(lengths[~is_long].sum())
    moved = in_long - whole.tokens
    return {
        "long": DomainSource(whole_sequences(documents, whole), Accounting(in_long, moved={"short": moved})),
        "short": DomainSource(packed_sequences(documents, rest, bins, length), Accounting(in_short + moved)),
    }


def packed_domain(name: str, documents: Sequence[NDArray[np.uint32]], length: int, seed: int) -> DomainSource:
    """One domain of documents that are cut only where they are longer than a sequence."""
    whole, rest = cut([len(document) for document in documents], length)
    bins = pack(rest.length, length, name, seed)
    sequences = [*whole_sequences(documents, whole), *packed_sequences(documents, rest, bins, length)]
    return DomainSource(sequences, Accounting(whole.tokens + rest.tokens))
