"""Packing documents into sequences of one length: no token is lost, no document that fits is cut."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numba import njit
from numpy.typing import NDArray

from ropewalk.data.hashing import permutation
from ropewalk.data.store import PackedSequence


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
        ValueError: for a piece that is empty or longer than a sequence.
    """
    outside = lengths[(lengths < 1) | (lengths > sequence_length)]
    if len(outside):
        raise ValueError(
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


def whole_sequences(documents: Sequence[NDArray[np.uint32]], pieces: Pieces) -> Iterator[PackedSequence]:
    """One sequence for each piece; the pieces fill their sequences exactly."""
    for document, start, length in zip(pieces.document, pieces.start, pieces.length, strict=True):
        yield PackedSequence(documents[document][start : start + length], np.array([length], dtype=np.int32))


def packed_sequences(
    documents: Sequence[NDArray[np.uint32]], pieces: Pieces, bins: Bins, sequence_length: int
) -> Iterator[PackedSequence]:
    """One sequence for each bin, padded with token 0 after its last piece."""
    for first, last in zip(bins.offsets[:-1], bins.offsets[1:], strict=True):
        inside = bins.order[first:last]
        ends = np.cumsum(pieces.length[inside])
        tokens = np.zeros(sequence_length, dtype=np.uint32)
        tokens[: ends[-1]] = np.concatenate(
            [documents[pieces.document[i]][pieces.start[i] : pieces.start[i] + pieces.length[i]] for i in inside]
        )
        yield PackedSequence(tokens, ends.astype(np.int32))


@njit
def _best_fit(lengths, capacity):  # type: ignore[no-untyped-def]
    """Bin of each length (int64, in decreasing order) by best fit, and the number of bins.

    Open bins hang in stacks by the room they have left; a segment tree over the capacity + 1 possible rooms
    knows which stacks are not empty, so the tightest bin is found in O(log capacity).
    """
    leaves = 1
    while leaves <= capacity:
        leaves *= 2
    occupied = np.zeros(2 * leaves, dtype=np.bool_)
    top = np.full(capacity + 1, -1, dtype=np.int64)
    below = np.full(len(lengths), -1, dtype=np.int64)
    bin_of = np.empty(len(lengths), dtype=np.int64)
    n_bins = 0
    for i in range(len(lengths)):
        room = _tightest(occupied, leaves, lengths[i])
        if room < 0:
            room, chosen = capacity, n_bins
            n_bins += 1
        else:
            chosen = top[room]
            top[room] = below[chosen]
            if top[room] < 0:
                _mark(occupied, leaves, room, False)
        bin_of[i] = chosen
        left = room - lengths[i]
        if left > 0:
            below[chosen] = top[left]
            top[left] = chosen
            _mark(occupied, leaves, left, True)
    return bin_of, n_bins


@njit
def _tightest(occupied, leaves, need):  # type: ignore[no-untyped-def]
    """The smallest room of at least ``need`` that a bin has, or -1."""
    node = leaves + need
    if occupied[node]:
        return need
    while node > 1:
        if node % 2 == 0 and occupied[node + 1]:
            node += 1
            while node < leaves:
                node = 2 * node if occupied[2 * node] else 2 * node + 1
            return node - leaves
        node //= 2
    return -1


@njit
def _mark(occupied, leaves, room, value):  # type: ignore[no-untyped-def]
    """Record whether a bin with this room exists, from the leaf up to the root."""
    node = leaves + room
    occupied[node] = value
    node //= 2
    while node >= 1:
        occupied[node] = occupied[2 * node] or occupied[2 * node + 1]
        node //= 2
