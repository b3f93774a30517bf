"""Writing a packed store: streamed, and a store only once its manifest is renamed into place."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from ropewalk.data.manifest import (
    MANIFEST,
    TOKENIZER,
    DomainInfo,
    Manifest,
    Shard,
    StoredFile,
    check_domain_name,
)
from ropewalk.data.store import TOKEN_DTYPE, PackedSequence, PackedStore
from ropewalk.data.tokenizer import describe_tokenizer
from ropewalk.files import fsync_path, sha256_of, write_atomically

SHARD_BYTES = 2**30


@dataclass(frozen=True)
class Accounting:
    """What became of a domain's tokens: ``tokens_in`` = packed + moved + dropped.

    Attributes:
        tokens_in: tokens that came in, including those moved from other domains.
        moved: domain -> tokens handed on to it.
        dropped: reason -> tokens left out.
    """

    tokens_in: int
    moved: dict[str, int] = field(default_factory=dict)
    dropped: dict[str, int] = field(default_factory=dict)


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
        ValueError: for a root that is a store already, no sequences at all, a sequence of another length or
            with boundaries that do not increase, a token outside the vocabulary, or accounting that does not
            add up.
    """
    root = Path(root)
    if (root / MANIFEST).exists():
        raise ValueError(f"{root} is a packed store already; remove it or write to another directory")
    if set(accounting) != set(domains):
        raise ValueError(f"accounting is of {sorted(accounting)}, the domains are {sorted(domains)}; give one for each")
    root.mkdir(parents=True, exist_ok=True)
    tokenizer = _copy_tokenizer(Path(tokenizer_dir), root / TOKENIZER)
    written = {}
    for name, sequences in domains.items():
        writer = _DomainWriter(root, check_domain_name(name), sequence_length, tokenizer["vocab_size"], shard_bytes)
        written[name] = writer.write(sequences)
        _check_accounting(name, accounting[name], written[name].tokens)
    if not any(info.sequences for info in written.values()):
        raise ValueError(f"{root} would hold no sequence of {sequence_length} tokens; give it documents")
    manifest = Manifest(sequence_length, tokenizer, written, {name: asdict(accounting[name]) for name in written})
    fsync_path(root)
    write_atomically(root / MANIFEST, manifest.to_json())
    fsync_path(root.parent)
    return PackedStore(root)


class _DomainWriter:
    """Streams one domain into shards and its index."""

    def __init__(self, root: Path, name: str, sequence_length: int, vocab_size: int, shard_bytes: int) -> None:
        self._root = root
        self._name = name
        self._length = sequence_length
        self._vocab_size = vocab_size
        self._per_shard = max(1, shard_bytes // (sequence_length * TOKEN_DTYPE.itemsize))
        self._ends: list[np.ndarray] = []

    def write(self, sequences: Iterable[PackedSequence]) -> DomainInfo:
        directory = self._root / self._name
        if directory.exists():
            shutil.rmtree(directory)
        directory.mkdir()
        shards = tuple(self._shards(iter(sequences)))
        counts = [len(ends) for ends in self._ends]
        tokens = sum(int(ends[-1]) for ends in self._ends)
        offsets = self._save("offsets.npy", np.cumsum([0, *counts], dtype="<i8"))
        ends = self._save("ends.npy", np.concatenate([*self._ends, np.empty(0)]).astype("<i4"))
        fsync_path(directory)
        return DomainInfo(
            sequences=len(counts),
            documents=sum(counts),
            tokens=tokens,
            trained_tokens=tokens - sum(counts),
            padding=len(counts) * self._length - tokens,
            shards=shards,
            offsets=offsets,
            ends=ends,
        )

    def _shards(self, sequences: Iterator[PackedSequence]) -> Iterator[Shard]:
        following = next(sequences, None)
        number = 0
        while following is not None:
            path = self._root / self._name / f"tokens-{number:05d}.bin"
            digest, count = hashlib.sha256(), 0
            with path.open("wb") as file:
                while following is not None and count < self._per_shard:
                    data = self._checked(following).tobytes()
                    file.write(data)
                    digest.update(data)
                    count += 1
                    following = next(sequences, None)
            fsync_path(path)
            yield Shard(f"{self._name}/{path.name}", path.stat().st_size, digest.hexdigest(), count)
            number += 1

    def _checked(self, sequence: PackedSequence) -> np.ndarray:
        """The tokens as they are written; the ends go to the index."""
        where = f"sequence {len(self._ends)} of {self._name}"
        tokens, ends = sequence.tokens, sequence.ends
        if tokens.shape != (self._length,):
            raise ValueError(f"{where} has the shape {tokens.shape}; give it ({self._length},)")
        if len(ends) == 0 or ends[-1] > self._length or np.any(np.diff(ends, prepend=0) < 1):
            raise ValueError(f"{where} has the ends {ends}; they must increase from 1 to at most {self._length}")
        if (largest := int(tokens.max())) >= self._vocab_size:
            raise ValueError(
                f"{where} has token {largest}, the tokenizer has {self._vocab_size}; use its own tokenizer"
            )
        self._ends.append(ends)
        return tokens.astype(TOKEN_DTYPE, copy=False)

    def _save(self, name: str, array: np.ndarray) -> StoredFile:
        path = self._root / self._name / name
        np.save(path, array, allow_pickle=False)
        fsync_path(path)
        return StoredFile(f"{self._name}/{name}", path.stat().st_size, sha256_of(path))


def _copy_tokenizer(source: Path, target: Path) -> dict[str, Any]:
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
        raise ValueError(
            f"{accounting.tokens_in} tokens came into {name}, but {packed} were packed, {moved} moved and "
            f"{dropped} dropped; account for every token"
        )
