"""From tokenized documents to the domains of a store, every token accounted for."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import chain

import numpy as np

from ropewalk.config.data import CorpusConfig, DomainConfig
from ropewalk.config.rules import one_of
from ropewalk.data.prepare.packing import Documents, Pieces, chunk, cut, pack, packed_sequences, whole_sequences
from ropewalk.data.prepare.sources import SPLIT_DOMAIN
from ropewalk.data.prepare.token_files import FlatDocuments
from ropewalk.data.store.manifest import check_domain_name
from ropewalk.data.store.reader import PackedSequence
from ropewalk.data.store.writer import Accounting
from ropewalk.errors import UserError

DROP = "drop"
RETRIEVAL = "retrieval"  # the domain of corpus.retrieval_tokens


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
            pack_it = _concatenated if rule.packing == "concat" else _best_fit
            result[name] = DomainSource(pack_it(have, pools[name], length, (name, *key)), account)
    return {name: result[name] for name in rules}


def _concatenated(
    have: DomainDocuments, pool: list[tuple[FlatDocuments, Pieces]], length: int, key: tuple[str | int, ...]
) -> Iterator[PackedSequence]:
    assert not pool, "validate_domains lets no domain hand its remainders to one of packing=concat"
    pieces, bins = chunk(have.documents.lengths, length)
    return packed_sequences(have.documents, pieces, bins, length, have.masks)


def _best_fit(
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
