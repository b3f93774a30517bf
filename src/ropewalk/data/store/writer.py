"""Writing a packed store: streamed, and a store only once its manifest is renamed into place."""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from itertools import chain, count, islice
from pathlib import Path
from typing import Any

from ropewalk.data.store.manifest import MANIFEST, TOKENIZER, DomainInfo, Manifest, token_dtype
from ropewalk.data.store.part_writer import Part, PartWriter
from ropewalk.data.store.reader import PackedSequence, PackedStore
from ropewalk.data.store.tokenizer_files import describe_tokenizer
from ropewalk.errors import UserError
from ropewalk.files import fsync_path, write_atomically

SHARD_BYTES = 2**30


@dataclass(frozen=True)
class Accounting:
    """Accounting of a domain's tokens: ``tokens_in`` = packed + moved + dropped.

    Attributes:
        tokens_in: tokens that came in, including those moved from other domains.
        moved: domain -> tokens handed on to it.
        dropped: reason -> tokens left out.
    """

    tokens_in: int
    moved: dict[str, int] = field(default_factory=dict)
    dropped: dict[str, int] = field(default_factory=dict)

    def __add__(self, other: Accounting) -> Accounting:
        moved, dropped = (
            dict(Counter(a) + Counter(b)) for a, b in ((self.moved, other.moved), (self.dropped, other.dropped))
        )
        return Accounting(self.tokens_in + other.tokens_in, moved, dropped)


def write_store(
    root: str | Path,
    sequence_length: int,
    domains: Mapping[str, Iterable[PackedSequence]],
    tokenizer_dir: str | Path,
    accounting: Mapping[str, Accounting],
    *,
    shard_bytes: int = SHARD_BYTES,
) -> PackedStore:
    """Write a store; what an unfinished writing left in ``root`` is replaced.

    Args:
        root: directory of the new store.
        sequence_length: tokens of every sequence.
        domains: name -> its sequences, consumed once and in order.
        tokenizer_dir: Hugging Face tokenizer directory; copied.
        accounting: name -> what became of its tokens; checked against what was written.
        shard_bytes: size that a token file has at most (but at least one sequence).

    Raises:
        UserError: for a root that is a store already, no sequences at all, a sequence of another length or
            with boundaries that do not increase, a token outside the vocabulary, or accounting that does not
            add up.
    """
    root = Path(root)
    if (root / MANIFEST).exists():
        raise UserError(f"{root} is a packed store already; remove it or write to another directory")
    if set(accounting) != set(domains):
        raise UserError(f"accounting is of {sorted(accounting)}, the domains are {sorted(domains)}; give one for each")
    root.mkdir(parents=True, exist_ok=True)
    tokenizer = copy_tokenizer(Path(tokenizer_dir), root / TOKENIZER)
    written = {}
    for name, sequences in domains.items():
        writer = PartWriter(root, name, sequence_length, tokenizer["vocab_size"])
        shutil.rmtree(root / name, ignore_errors=True)
        per_part = max(1, shard_bytes // (sequence_length * token_dtype(tokenizer["vocab_size"]).itemsize))
        written[name] = writer.assemble(list(_parts(writer, iter(sequences), per_part)))
    return commit_store(root, sequence_length, tokenizer, written, accounting)


def commit_store(
    root: Path,
    sequence_length: int,
    tokenizer: dict[str, Any],
    domains: Mapping[str, DomainInfo],
    accounting: Mapping[str, Accounting],
    sources: list[dict[str, Any]] | None = None,
) -> PackedStore:
    """Write the manifest, last, so that the directory is a store.

    Args:
        root: directory of the store; its token and index files are there.
        sequence_length: tokens of every sequence.
        tokenizer: see describe_tokenizer.
        domains: name -> its files.
        accounting: name -> what became of its tokens; perhaps also of domains that have no sequence.
        sources: what the documents were read from.

    Raises:
        UserError: for no sequences at all, or accounting that does not add up.
    """
    for name, account in accounting.items():
        _check_accounting(name, account, domains[name].tokens if name in domains else 0)
    if not any(info.sequences for info in domains.values()):
        raise UserError(f"{root} would hold no sequence of {sequence_length} tokens; give it documents")
    manifest = Manifest(
        sequence_length,
        tokenizer,
        dict(domains),
        {name: asdict(account) for name, account in accounting.items()},
        sources,
        token_dtype(tokenizer["vocab_size"]).str,
    )
    fsync_path(root)
    write_atomically(root / MANIFEST, manifest.to_json())
    fsync_path(root.parent)
    return PackedStore(root)


def _parts(writer: PartWriter, sequences: Iterator[PackedSequence], per_part: int) -> Iterator[Part]:
    """Parts of ``per_part`` sequences, the last of what is left."""
    for number in count():
        following = next(sequences, None)
        if following is None:
            return
        yield writer.write(number, chain([following], islice(sequences, per_part - 1)))


def copy_tokenizer(source: Path, target: Path) -> dict[str, Any]:
    """Copy a tokenizer's files into a store and describe it; see describe_tokenizer."""
    description = describe_tokenizer(source)
    if target.exists():
        shutil.rmtree(target)
    target.mkdir()
    for path in sorted(path for path in source.iterdir() if path.is_file()):
        fsync_path(Path(shutil.copyfile(path, target / path.name)))
    fsync_path(target)
    return description


def _check_accounting(name: str, accounting: Accounting, packed: int) -> None:
    moved, dropped = sum(accounting.moved.values()), sum(accounting.dropped.values())
    if accounting.tokens_in != packed + moved + dropped:
        raise UserError(
            f"{accounting.tokens_in} tokens came into {name}, but {packed} were packed, {moved} moved and "
            f"{dropped} dropped; account for every token"
        )
