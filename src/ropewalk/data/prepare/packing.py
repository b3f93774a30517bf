"""Packing documents into sequences of one length: no token is lost, no document that fits is cut."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from ropewalk.data.store.hashing import permutation
from ropewalk.data.store.reader import PackedSequence
from ropewalk.errors import UserError

FEW_PIECES = 20_000  # packed in under 0.05 s here, where importing numba takes 0.4 s


@dataclass(frozen=True)
class Pieces:
    """Contiguous parts of documents.

    Attributes:
        document: int64 (n_pieces,), which document.
        start: int64 (n_pieces,), first token of the piece in its document.
        length: int64 (n_pieces,), tokens; at least 1.
    """

    document: NDArray[np.int64]
    start: NDArray[np.int64]
    length: NDArray[np.int64]

    @property
    def tokens(self) -> int:
        """Tokens of all pieces together."""
        return int(self.length.sum())


@dataclass(frozen=True)
class Bins:
    """Pieces by sequence: bin b holds pieces ``order[offsets[b]:offsets[b + 1]]``, the largest first."""

    order: NDArray[np.int64]
    offsets: NDArray[np.int64]


def cut(lengths: Sequence[int] | NDArray[np.int64], sequence_length: int) -> tuple[Pieces, Pieces]:
    """Cut documents into whole sequences and what is left of each.

    Args:
        lengths: tokens of each document, (n_documents,).
        sequence_length: tokens of a sequence.

    Returns:
        The whole pieces, each exactly ``sequence_length`` tokens of one document, and the remainders, each
        shorter; a document shorter than ``sequence_length`` is its own remainder.
    """
    lengths = np.asarray(lengths, dtype=np.int64)
    whole = lengths // sequence_length
    document = np.repeat(np.arange(len(lengths)), whole)
    first = np.cumsum(whole) - whole
    start = (np.arange(len(document)) - first[document]) * sequence_length
    remainder = lengths - whole * sequence_length
    (left,) = np.nonzero(remainder)
    return (
        Pieces(document, start, np.full(len(document), sequence_length, dtype=np.int64)),
        Pieces(left, whole[left] * sequence_length, remainder[left]),
    )


def pack(lengths: NDArray[np.int64], sequence_length: int, *key: str | int) -> Bins:
    """Pack pieces by best-fit decreasing, then shuffle the bins by a stable hash of ``key``.

    The shuffle is needed because best-fit decreasing leaves the bins ordered by the length of their pieces.

    Args:
        lengths: tokens of each piece, (n_pieces,), 1 to ``sequence_length``.
        sequence_length: tokens that a bin holds at most.
        key: what the shuffle depends on.

    Raises:
        UserError: for a piece that is empty or longer than a sequence.
    """
    outside = lengths[(lengths < 1) | (lengths > sequence_length)]
    if len(outside):
        raise UserError(
            f"a piece of {outside[0]} tokens cannot be packed into sequences of {sequence_length}; "
            f"pieces have 1 to {sequence_length} tokens: cut documents first with cut()"
        )
    largest_first = np.argsort(-lengths, kind="stable")
    bin_of, n_bins = _best_fit(lengths[largest_first], sequence_length)
    place = np.empty(n_bins, dtype=np.int64)
    place[permutation(n_bins, "bins", *key)] = np.arange(n_bins)
    shuffled = place[bin_of]
    order = largest_first[np.argsort(shuffled, kind="stable")]
    offsets = np.concatenate([[0], np.cumsum(np.bincount(shuffled, minlength=n_bins))])
    return Bins(order, offsets.astype(np.int64))


def _best_fit(lengths: NDArray[np.int64], capacity: int) -> tuple[NDArray[np.int64], int]:
    """Bin of each length (int64, in decreasing order) by best fit, and the number of bins.

    Of bins with the same room, the one that came to it last is taken.
    """
    if len(lengths) >= FEW_PIECES:
        from ropewalk.data.prepare.best_fit import best_fit

        return best_fit(lengths, capacity)
    rooms: list[tuple[int, int, int]] = []  # of each bin: what it has left, minus when it came to that, its number
    bin_of, n_bins = np.empty(len(lengths), dtype=np.int64), 0
    for i, length in enumerate(lengths.tolist()):
        tightest = bisect_left(rooms, (length,))
        if tightest < len(rooms):
            room, _, chosen = rooms.pop(tightest)
        else:
            room, chosen = capacity, n_bins
            n_bins += 1
        bin_of[i] = chosen
        if room > length:
            insort(rooms, (room - length, -i, chosen))
    return bin_of, n_bins


def chunk(lengths: NDArray[np.int64], sequence_length: int) -> tuple[Pieces, Bins]:
    """Documents as they come, cut wherever a sequence is full (ProLong's way): the pieces, and those of each sequence.

    Args:
        lengths: tokens of each document, (n_documents,), at least 1.
        sequence_length: tokens of a sequence; the last one may have fewer.
    """
    ends = np.cumsum(lengths)
    total = int(ends[-1]) if len(ends) else 0
    cuts = np.union1d(ends, np.arange(sequence_length, total, sequence_length))
    starts = np.concatenate([[0], cuts[:-1]])[: len(cuts)]
    document = np.searchsorted(ends, starts, side="right")
    offsets = np.searchsorted(starts, np.arange(0, total + sequence_length, sequence_length))
    pieces = Pieces(document, starts - (ends[document] - lengths[document]), cuts - starts)
    return pieces, Bins(np.arange(len(cuts)), offsets if total else np.zeros(1, dtype=np.int64))


class Documents(Protocol):
    """Documents by their number: tokens, or loss masks."""

    def __getitem__(self, index: int, /) -> NDArray[Any]:
        """One document."""


def whole_sequences(documents: Documents, pieces: Pieces, masks: Documents | None = None) -> Iterator[PackedSequence]:
    """One sequence for each piece; the pieces fill their sequences exactly."""
    for document, start, length in zip(pieces.document, pieces.start, pieces.length, strict=True):
        tokens = documents[document][start : start + length]
        mask = None if masks is None else masks[document][start : start + length]
        yield PackedSequence(tokens, np.array([length], dtype=np.int32), mask)


def packed_sequences(
    documents: Documents, pieces: Pieces, bins: Bins, sequence_length: int, masks: Documents | None = None
) -> Iterator[PackedSequence]:
    """One sequence for each bin, padded with token 0 after its last piece."""

    def gathered(source: Documents, inside: NDArray[np.int64], dtype: type) -> NDArray[Any]:
        row: NDArray[Any] = np.zeros(sequence_length, dtype=dtype)
        parts = [source[pieces.document[i]][pieces.start[i] : pieces.start[i] + pieces.length[i]] for i in inside]
        filled = np.concatenate(parts)
        row[: len(filled)] = filled
        return row

    for first, last in pairwise(bins.offsets):
        inside = bins.order[first:last]
        ends = np.cumsum(pieces.length[inside]).astype(np.int32)
        mask = None if masks is None else gathered(masks, inside, np.bool_)
        yield PackedSequence(gathered(documents, inside, np.uint32), ends, mask)
