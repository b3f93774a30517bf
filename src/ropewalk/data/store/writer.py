"""Writing a packed store, part by part; it is a store once its manifest is renamed into place.

A part is one token file of a domain. Any process can write it, in any order; its record, written last, marks it whole.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from array import array
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field, replace
from itertools import chain, count, islice
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ropewalk.data.store.manifest import (
    MANIFEST,
    TOKENIZER,
    DomainInfo,
    Manifest,
    Shard,
    StoredFile,
    check_domain_name,
    parse_shard,
    token_dtype,
)
from ropewalk.data.store.reader import PackedSequence, PackedStore, sequence_check
from ropewalk.data.store.tokenizer_files import copy_tokenizer
from ropewalk.data.store.visuals import COLUMNS, check_visuals, stored_bytes, visual_row
from ropewalk.errors import UserError
from ropewalk.files import fsync_path, read_object, sha256_of, write_atomically

SHARD_BYTES = 2**30
COUNTS = {"pieces": np.int32, "ends": np.int32, "trained": np.int32, "checks": np.uint64}


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


@dataclass(frozen=True)
class Part:
    """A token file with the boundaries of its sequences.

    Attributes:
        shard: the file as the manifest will name it.
        pieces: document pieces of each sequence.
        ends: where each piece ends in its sequence, those of all sequences in order.
        trained: tokens that each sequence trains.
        checks: of each sequence; see reader.sequence_check.
        visuals: of each sequence, how many.
        visual_rows: int64 (visuals, 10), those of all sequences in order; see store.visuals.
    """

    shard: Shard
    pieces: NDArray[np.int32]
    ends: NDArray[np.int32]
    trained: NDArray[np.int32]
    checks: NDArray[np.uint64]
    visuals: NDArray[np.int32] = field(default_factory=lambda: np.zeros(0, np.int32))
    visual_rows: NDArray[np.int64] = field(default_factory=lambda: np.zeros((0, len(COLUMNS)), np.int64))

    @property
    def tokens(self) -> int:
        """Tokens without padding."""
        return int(self.ends[np.cumsum(self.pieces, dtype=np.int64) - 1].sum(dtype=np.int64))


class HashedFile:
    """A file of a store while it is written: hashed as it grows, on the disk when closed."""

    def __init__(self, root: Path, name: str) -> None:
        """Replace ``root / name``."""
        self._path, self._name = root / name, name
        self._file = self._path.open("wb")
        self._digest = hashlib.sha256()

    def __enter__(self) -> HashedFile:
        return self

    def __exit__(self, *error: object) -> None:
        self._file.close()
        fsync_path(self._path)

    def write(self, data: bytes) -> int:
        """Append; returns the number of bytes."""
        self._digest.update(data)
        return self._file.write(data)

    @property
    def stored(self) -> StoredFile:
        """The file as a manifest names it, once it is closed."""
        return StoredFile(self._name, self._path.stat().st_size, self._digest.hexdigest())


@dataclass(frozen=True)
class PartWriter:
    """Writes the parts of one domain.

    Attributes:
        root: directory of the store.
        domain: its name.
        sequence_length: tokens of every sequence.
        vocab_size: entries of the tokenizer.
    """

    root: Path
    domain: str
    sequence_length: int
    vocab_size: int

    def __post_init__(self) -> None:
        check_domain_name(self.domain)

    def write(self, number: int, sequences: Iterable[PackedSequence]) -> Part:
        """Write part ``number``; a file of that name is replaced.

        Raises:
            UserError: for a sequence of another length, boundaries that do not increase, a token outside the
                vocabulary, a loss mask where the first sequence has none (or the other way round), or visuals that
                do not fit their sequence.
        """
        name = f"{self.domain}/tokens-{number:05d}.bin"
        (self.root / self.domain).mkdir(parents=True, exist_ok=True)
        pieces, ends, trained, checks = array("i"), array("i"), array("i"), array("Q")
        masks: HashedFile | None = None
        media: HashedFile | None = None
        visuals, rows, written = array("i"), array("q"), 0
        with HashedFile(self.root, name) as tokens, ExitStack() as stack:
            for index, sequence in enumerate(sequences):
                where = f"sequence {index} of {name}"
                row, mask = self._checked(sequence, where), None
                tokens.write(row.tobytes())
                if index == 0 and sequence.loss_mask is not None:
                    masks = stack.enter_context(HashedFile(self.root, name.replace("/tokens-", "/mask-")))
                if (sequence.loss_mask is not None) != (masks is not None):
                    raise UserError(f"{where} and the first one do not both have a loss mask; give it to all or none")
                if masks is not None and sequence.loss_mask is not None:
                    mask = self._packed_mask(sequence.loss_mask, where)
                    masks.write(mask.tobytes())
                pieces.append(len(sequence.ends))
                ends.extend(sequence.ends.tolist())
                trained.append(sequence.trained_tokens)
                checks.append(sequence_check(row, mask, sequence.ends, sequence.visuals))
                visuals.append(len(sequence.visuals))
                if sequence.visuals and media is None:
                    media = stack.enter_context(HashedFile(self.root, name.replace("/tokens-", "/media-")))
                for visual in sequence.visuals:
                    rows.extend(visual_row(visual, written))
                    written += media.write(stored_bytes(visual)) if media is not None else 0
        beside = [file.stored if file is not None else None for file in (masks, media)]
        shard = Shard(**asdict(tokens.stored), sequences=len(pieces), mask=beside[0], media=beside[1])
        columns = zip((pieces, ends, trained, checks), COUNTS.values(), strict=True)
        part = Part(shard, *(np.array(counts, dtype=dtype) for counts, dtype in columns))
        visual_rows = np.array(rows, np.int64).reshape(-1, len(COLUMNS))
        return replace(part, visuals=np.array(visuals, np.int32), visual_rows=visual_rows)

    def record(self, number: int, part: Part, accounting: Accounting) -> None:
        """Record on disk that part ``number``, of text alone, is whole, and what became of its tokens."""
        assert part.shard.media is None  # visuals are not in a record
        counts = {name: getattr(part, name).tolist() for name in COUNTS}
        content = {"shard": asdict(part.shard), "accounting": asdict(accounting), **counts}
        write_atomically(self._record(number), json.dumps(content) + "\n")

    def finished(self, number: int) -> tuple[Part, Accounting] | None:
        """Part ``number`` as recorded; None if it is not, or a file of it no longer has its size."""
        record = self._record(number)
        if not record.is_file():
            return None
        content = read_object(record)
        shard = parse_shard(content["shard"])
        for stored in (shard, *([shard.mask] if shard.mask else [])):
            file = self.root / stored.file
            if not file.is_file() or file.stat().st_size != stored.bytes:
                return None
        part = Part(shard, *(np.array(content[name], dtype=dtype) for name, dtype in COUNTS.items()))
        return part, Accounting(**content["accounting"])

    def assemble(self, parts: Sequence[Part]) -> DomainInfo:
        """The index files of the domain and its entry in the manifest.

        Records and empty parts stay, as a call that is killed before the manifest is written needs them again; see
        clear_records.

        Raises:
            UserError: where some parts have loss masks and some have none.
        """
        directory = self.root / self.domain
        directory.mkdir(parents=True, exist_ok=True)
        parts = [part for part in parts if part.shard.sequences]
        masked = {part.shard.mask is not None for part in parts}
        if len(masked) > 1:
            raise UserError(f"some sequences of {self.domain} have loss masks, some have none; make two domains of it")
        pieces, ends, trained, checks = (
            np.concatenate([np.zeros(0, dtype), *(getattr(part, name) for part in parts)])
            for name, dtype in COUNTS.items()
        )
        offsets = np.concatenate([[0], np.cumsum(pieces, dtype=np.int64)])
        tokens = int(ends[offsets[1:] - 1].sum(dtype=np.int64))
        stored = self._save("offsets.npy", offsets.astype("<i8")), self._save("ends.npy", ends.astype("<i4"))
        fsync_path(directory)
        return DomainInfo(
            sequences=len(pieces),
            documents=len(ends),
            tokens=tokens,
            trained_tokens=int(trained.sum(dtype=np.int64)),
            padding=len(pieces) * self.sequence_length - tokens,
            shards=tuple(part.shard for part in parts),
            offsets=stored[0],
            ends=stored[1],
            trained=self._save("trained.npy", trained.astype("<i4")) if True in masked else None,
            checks=self._save("checks.npy", checks.astype("<u8")),
            **self._save_visuals(parts),
        )

    def _save_visuals(self, parts: Sequence[Part]) -> dict[str, StoredFile]:
        """The two index files of the visuals; empty where there are none."""
        rows = np.concatenate([np.zeros((0, len(COLUMNS)), np.int64), *(part.visual_rows for part in parts)])
        if not len(rows):
            return {}
        counts = np.concatenate([part.visuals for part in parts])
        offsets = np.concatenate([[0], np.cumsum(counts, dtype=np.int64)])
        visuals, starts = (
            self._save("visuals.npy", rows.astype("<i8")),
            self._save("visual_offsets.npy", offsets.astype("<i8")),
        )
        return {"visuals": visuals, "visual_offsets": starts}

    def assemble_recorded(self, count: int) -> tuple[DomainInfo, Accounting]:
        """The domain of the recorded parts 0 .. ``count`` - 1, see assemble, and the sum of their accounting.

        Raises:
            UserError: where one is not finished, or see assemble.
        """
        records = [self.finished(number) for number in range(count)]
        if None in records:
            where = f"part {records.index(None)} of {self.root / self.domain}"
            raise UserError(f"{where} is not packed; run stage=pack, or the conversion, again")
        parts, accounts = zip(*filter(None, records), strict=True)
        return self.assemble(parts), sum(accounts, Accounting(0))

    def _record(self, number: int) -> Path:
        return self.root / self.domain / f"part-{number:05d}.json"

    def _packed_mask(self, mask: NDArray[np.bool_], where: str) -> NDArray[np.uint8]:
        if mask.shape != (self.sequence_length,) or mask.dtype != np.bool_:
            raise UserError(
                f"{where} has a loss mask of {mask.dtype} {mask.shape}; give it bool ({self.sequence_length},)"
            )
        return np.packbits(mask)

    def _checked(self, sequence: PackedSequence, where: str) -> NDArray[Any]:
        """The tokens as they are written."""
        tokens, ends = sequence.tokens, sequence.ends
        if tokens.shape != (self.sequence_length,):
            raise UserError(f"{where} has the shape {tokens.shape}; give it ({self.sequence_length},)")
        if len(ends) == 0 or ends[-1] > self.sequence_length or np.any(np.diff(ends, prepend=0) < 1):
            raise UserError(f"{where} has the ends {ends}; they must increase from 1 to at most {self.sequence_length}")
        if (largest := int(tokens.max())) >= self.vocab_size:
            raise UserError(f"{where} has token {largest}, the tokenizer has {self.vocab_size}; use its own tokenizer")
        check_visuals(sequence.visuals, ends, sequence.loss_mask, where)
        return tokens.astype(token_dtype(self.vocab_size), copy=False)

    def _save(self, name: str, array: NDArray[np.generic]) -> StoredFile:
        path = self.root / self.domain / name
        np.save(path, array, allow_pickle=False)
        fsync_path(path)
        return StoredFile(f"{self.domain}/{name}", path.stat().st_size, sha256_of(path))


def clear_records(directory: Path) -> None:
    """Remove the records of a domain's parts, and the parts that are empty, once a manifest names the others."""
    for record in directory.glob("part-*.json"):
        shard = parse_shard(read_object(record)["shard"])
        if not shard.sequences:
            (directory.parent / shard.file).unlink(missing_ok=True)
        record.unlink()


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
        written[name] = writer.assemble(list(write_parts(writer, iter(sequences), per_part)))
    return commit_store(root, sequence_length, tokenizer, written, accounting)


def commit_store(
    root: Path,
    sequence_length: int,
    tokenizer: dict[str, Any],
    domains: Mapping[str, DomainInfo],
    accounting: Mapping[str, Accounting],
    sources: list[dict[str, Any]] | None = None,
    special_tokens: dict[str, Any] | None = None,
) -> PackedStore:
    """Write the manifest, last, so that the directory is a store.

    Args:
        root: directory of the store; its token and index files are there.
        sequence_length: tokens of every sequence.
        tokenizer: see describe_tokenizer.
        domains: name -> its files.
        accounting: name -> what became of its tokens; perhaps also of domains that have no sequence.
        sources: what the documents were read from.
        special_tokens: see Manifest.

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
        special_tokens=special_tokens,
    )
    fsync_path(root)
    write_atomically(root / MANIFEST, manifest.to_json())
    fsync_path(root.parent)
    return PackedStore(root)


def write_parts(writer: PartWriter, sequences: Iterator[PackedSequence], per_part: int) -> Iterator[Part]:
    """Write parts of ``per_part`` sequences, the last of what is left."""
    for number in count():
        following = next(sequences, None)
        if following is None:
            return
        yield writer.write(number, chain([following], islice(sequences, per_part - 1)))


def _check_accounting(name: str, accounting: Accounting, packed: int) -> None:
    moved, dropped = sum(accounting.moved.values()), sum(accounting.dropped.values())
    if accounting.tokens_in != packed + moved + dropped:
        raise UserError(
            f"{accounting.tokens_in} tokens came into {name}, but {packed} were packed, {moved} moved and "
            f"{dropped} dropped; account for every token"
        )
