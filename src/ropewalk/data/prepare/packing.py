"""Packing: the documents of each domain into sequences of one length, every token accounted for."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain, pairwise
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from ropewalk.config.data import CorpusConfig, DomainConfig
from ropewalk.config.rules import one_of
from ropewalk.data.prepare.sources import SPLIT_DOMAIN
from ropewalk.data.prepare.token_files import FlatDocuments
from ropewalk.data.store.hashing import permutation
from ropewalk.data.store.manifest import check_domain_name
from ropewalk.data.store.reader import PackedSequence
from ropewalk.data.store.writer import Accounting
from ropewalk.errors import UserError

DROP = "drop"
RETRIEVAL = "retrieval"  # the domain of corpus.retrieval_tokens


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

    def with_those_of(self, other: Pieces, first: int) -> Pieces:
        """These pieces, and those of other documents, whose numbers begin at ``first`` from now on."""
        shifted = other.document + first, other.start, other.length
        return Pieces(*map(np.concatenate, zip((self.document, self.start, self.length), shifted, strict=True)))


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
    shuffled_index = np.empty(n_bins, dtype=np.int64)
    shuffled_index[permutation(n_bins, "bins", *key)] = np.arange(n_bins)
    shuffled = shuffled_index[bin_of]
    order = largest_first[np.argsort(shuffled, kind="stable")]
    offsets = np.concatenate([[0], np.cumsum(np.bincount(shuffled, minlength=n_bins))])
    return Bins(order, offsets.astype(np.int64))


def _best_fit(lengths: NDArray[np.int64], capacity: int) -> tuple[NDArray[np.int64], int]:
    """Bin of each length (int64, in decreasing order) by best fit, and the number of bins.

    Of bins with the same space left, the one that came to it last is taken.
    """
    bin_of, n_bins = np.empty(len(lengths), dtype=np.int64), 0
    spaces: list[int] = []  # left in some bin, ascending
    bins: dict[int, list[int]] = {}  # space left -> the bins that have it
    for piece, length in enumerate(lengths.tolist()):
        tightest = bisect_left(spaces, length)
        if tightest < len(spaces):
            space = spaces[tightest]
            chosen = bins[space].pop()
            if not bins[space]:
                del spaces[tightest], bins[space]
        else:
            space, chosen = capacity, n_bins
            n_bins += 1
        bin_of[piece] = chosen
        left = space - length
        if left in bins:
            bins[left].append(chosen)
        elif left:
            insort(spaces, left)
            bins[left] = [chosen]
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


@dataclass(frozen=True)
class DomainDocuments:
    """The documents that came into a domain from its sources, and their loss masks, if they have some."""

    documents: FlatDocuments = field(default_factory=lambda: FlatDocuments([], []))
    masks: FlatDocuments | None = None


@dataclass(frozen=True)
class PackedDomain:
    """The sequences to be written as one domain."""

    sequences: Iterable[PackedSequence]
    accounting: Accounting


def pack_domains(
    rules: Mapping[str, DomainConfig], domains: Mapping[str, DomainDocuments], length: int, *key: str | int
) -> dict[str, PackedDomain]:
    """Pack the documents of each domain by its rule.

    ``long``: documents are cut into sequences of one document each. What fills none, the rest of a document or a
    document shorter than a sequence, goes to the domain that ``remainder`` names, or is dropped and counted.
    ``short``: documents longer than a sequence are cut so, the rest and all others go by best fit into sequences, and
    none of them is cut. ``concat``: documents follow each other and are cut where a sequence is full.

    Args:
        rules: domain -> how it is packed; checked by domain_rules.
        domains: domain -> what its sources gave.
        length: tokens of a sequence.
        key: what the order of packed sequences depends on.
    """
    remainders: dict[str, list[tuple[FlatDocuments, Pieces]]] = {name: [] for name in rules}
    packed: dict[str, PackedDomain] = {}
    for name in sorted(rules, key=lambda name: rules[name].packing != "long"):  # first, as others take what they leave
        rule, domain = rules[name], domains.get(name, DomainDocuments())
        documents, masks = domain.documents, domain.masks
        tokens_in = int(documents.lengths.sum())
        if rule.packing == "concat":
            pieces, bins = chunk(documents.lengths, length)
            sequences = packed_sequences(documents, pieces, bins, length, masks)
            packed[name] = PackedDomain(sequences, Accounting(tokens_in))
            continue
        whole, rest = cut(documents.lengths, length)
        sequences = whole_sequences(documents, whole, masks)
        if rule.packing == "short":
            for others, pieces in remainders[name]:
                rest = rest.with_those_of(pieces, len(documents))
                documents, tokens_in = documents + others, tokens_in + pieces.tokens
            bins = pack(rest.length, length, name, *key)
            sequences = chain(sequences, packed_sequences(documents, rest, bins, length, masks))
            account = Accounting(tokens_in)
        elif rule.remainder == DROP:
            cut_off = int(rest.length[rest.start > 0].sum())
            dropped = {"remainder": cut_off, "shorter than a sequence": rest.tokens - cut_off}
            account = Accounting(tokens_in, dropped={reason: count for reason, count in dropped.items() if count})
        else:
            remainders[rule.remainder].append((documents, rest))
            account = Accounting(tokens_in, moved={rule.remainder: rest.tokens} if rest.tokens else {})
        packed[name] = PackedDomain(sequences, account)
    return {name: packed[name] for name in rules}


def domain_rules(corpus: CorpusConfig) -> dict[str, DomainConfig]:
    """How each domain is packed: what ``corpus.domains`` says, else short; stdlib and paths are long and short.

    Raises:
        UserError: for a domain that no document comes into, or has some with loss masks and some without; an unknown
            packing; remainders that go to no domain of packing=short, or to or from one with loss masks.
    """
    rules: dict[str, DomainConfig] = {}
    if corpus.stdlib or corpus.paths:
        rules = {SPLIT_DOMAIN: DomainConfig("long", "short"), "short": DomainConfig()}
    chat: dict[str, set[bool]] = {}
    for source in corpus.sources:
        rules.setdefault(source.domain, DomainConfig())
        chat.setdefault(check_domain_name(source.domain), set()).add(source.chat)
    targets = {rule.remainder for rule in corpus.domains.values()} - {DROP}
    unknown = set(corpus.domains) - set(rules) - targets
    if unknown:
        raise UserError(f"corpus.domains names {', '.join(sorted(unknown))}, which no source has; correct it")
    rules.update(corpus.domains)
    rules.update({name: DomainConfig() for name in sorted(targets - set(rules))})
    if corpus.retrieval_tokens and RETRIEVAL in rules:
        raise UserError(f"the domain {RETRIEVAL} is taken by corpus.retrieval_tokens; call the source's another name")
    mixed = [name for name, kinds in chat.items() if len(kinds) > 1 or (True in kinds and name == SPLIT_DOMAIN)]
    if mixed:
        raise UserError(f"the domain {mixed[0]} has sources with chat and without; give them different domains")
    masked = {name for name, kinds in chat.items() if True in kinds}
    for name, rule in rules.items():
        one_of(f"corpus.domains.{name}.packing", rule.packing, ("long", "short", "concat"))
    for name, rule in rules.items():
        where = f"corpus.domains.{name}.remainder={rule.remainder}"
        if rule.remainder == DROP:
            continue
        if rule.packing != "long":
            raise UserError(f"corpus.domains.{name}.remainder is for packing=long; leave it out")
        if rule.remainder not in rules or rules[rule.remainder].packing != "short":
            raise UserError(f"{where} is not a domain of packing=short; name one, or drop")
        if masked & {name, rule.remainder}:
            raise UserError(f"{where}: one of the two has loss masks; set it to drop")
    return rules
