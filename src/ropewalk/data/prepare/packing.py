"""Packing: the documents of each domain into sequences of one length, every token accounted for."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
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
class DomainSource:
    """The sequences to be written as one domain."""

    sequences: Iterable[PackedSequence]
    accounting: Accounting


@dataclass(frozen=True)
class DomainDocuments:
    """The documents that came into a domain from its sources, and their loss masks, if they have some."""

    documents: FlatDocuments
    masks: FlatDocuments | None = None


def pack_domains(
    rules: Mapping[str, DomainConfig], found: Mapping[str, DomainDocuments], length: int, *key: str | int
) -> dict[str, DomainSource]:
    """Pack the documents of each domain by its rule.

    ``long``: documents are cut into sequences of one document each. What fills none, the rest of a document or a
    document shorter than a sequence, goes to the domain that ``remainder`` names, or is dropped and counted.
    ``short``: documents longer than a sequence are cut so, the rest and all others go by best fit into sequences, and
    none of them is cut. ``concat``: documents follow each other and are cut where a sequence is full.

    Args:
        rules: domain -> how it is packed; checked by validate_domains.
        found: domain -> what its sources gave.
        length: tokens of a sequence.
        key: what the order of packed sequences depends on.
    """
    pools: dict[str, list[tuple[FlatDocuments, Pieces]]] = {name: [] for name in rules}
    moved_in = dict.fromkeys(rules, 0)
    result: dict[str, DomainSource] = {}
    long = [name for name, rule in rules.items() if rule.packing == "long"]
    for name in long:  # first, since others take what they leave
        have = found.get(name)
        documents = FlatDocuments([], []) if have is None else have.documents
        whole, rest = cut(documents.lengths, length)
        target = rules[name].remainder
        tokens_in = whole.tokens + rest.tokens
        if target == DROP:
            cut_off = int(rest.length[rest.start > 0].sum())
            dropped = {"remainder": cut_off, "shorter than a sequence": rest.tokens - cut_off}
            account = Accounting(tokens_in, dropped={reason: count for reason, count in dropped.items() if count})
        else:
            pools[target].append((documents, rest))
            moved_in[target] += rest.tokens
            account = Accounting(tokens_in, moved={target: rest.tokens} if rest.tokens else {})
        result[name] = DomainSource(whole_sequences(documents, whole), account)
    for name, rule in rules.items():
        if name not in long:
            have = found.get(name, DomainDocuments(FlatDocuments([], [])))
            account = Accounting(int(have.documents.lengths.sum()) + moved_in[name])
            pack_it = _concatenated if rule.packing == "concat" else _packed
            result[name] = DomainSource(pack_it(have, pools[name], length, (name, *key)), account)
    return {name: result[name] for name in rules}


def _concatenated(
    have: DomainDocuments, pool: list[tuple[FlatDocuments, Pieces]], length: int, key: tuple[str | int, ...]
) -> Iterator[PackedSequence]:
    assert not pool, "validate_domains lets no domain hand its remainders to one of packing=concat"
    pieces, bins = chunk(have.documents.lengths, length)
    return packed_sequences(have.documents, pieces, bins, length, have.masks)


def _packed(
    have: DomainDocuments, pool: list[tuple[FlatDocuments, Pieces]], length: int, key: tuple[str | int, ...]
) -> Iterator[PackedSequence]:
    whole, rest = cut(have.documents.lengths, length)
    documents: FlatDocuments = have.documents
    for others, pieces in pool:
        shifted = Pieces(pieces.document + len(documents), pieces.start, pieces.length)
        rest = Pieces(*(np.concatenate(pair) for pair in zip(_fields(rest), _fields(shifted), strict=True)))
        documents = documents + others
    bins = pack(rest.length, length, *key)
    masks: Documents | None = have.masks
    return chain(
        whole_sequences(documents, whole, masks),
        packed_sequences(documents, rest, bins, length, masks),
    )


def _fields(pieces: Pieces) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    return pieces.document, pieces.start, pieces.length


def domain_rules(corpus: CorpusConfig) -> dict[str, DomainConfig]:
    """How each domain is packed: what ``corpus.domains`` says, else short; stdlib and paths are long and short.

    Raises:
        UserError: for rules that do not fit, or of a domain that no document comes into.
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
    validate_domains(rules, {name: True in kinds for name, kinds in chat.items()})
    return rules


def validate_domains(rules: Mapping[str, DomainConfig], masked: Mapping[str, bool]) -> None:
    """Check how domains are packed.

    Args:
        rules: every domain.
        masked: domain -> whether its documents have loss masks.

    Raises:
        UserError: for an unknown packing, remainders that go to no domain of packing=short, or to or from one with
            loss masks.
    """
    for name, rule in rules.items():
        one_of(f"corpus.domains.{name}.packing", rule.packing, ("long", "short", "concat"))
    for name, rule in rules.items():
        if rule.packing != "long" or rule.remainder == DROP:
            if rule.remainder != DROP:
                raise UserError(f"corpus.domains.{name}.remainder is for packing=long; leave it out")
            continue
        where = f"corpus.domains.{name}.remainder={rule.remainder}"
        if rule.remainder not in rules or rules[rule.remainder].packing != "short":
            raise UserError(f"{where} is not a domain of packing=short; name one, or drop")
        if masked.get(name) or masked.get(rule.remainder):
            raise UserError(f"{where}: one of the two has loss masks; set it to drop")
