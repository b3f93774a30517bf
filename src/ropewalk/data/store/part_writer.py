"""One token file of a domain at a time: written and hashed by itself, put together at the end.

A part can be made by any process in any order; its record, written last, says that it is whole.
"""

from __future__ import annotations

import hashlib
import json
from array import array
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ropewalk.data.store.hashing import sequence_check
from ropewalk.data.store.manifest import DomainInfo, Shard, StoredFile, check_domain_name, parse_shard, token_dtype
from ropewalk.data.store.reader import PackedSequence
from ropewalk.errors import UserError
from ropewalk.files import fsync_path, sha256_of, write_atomically

COUNTS = {"pieces": np.int32, "ends": np.int32, "trained": np.int32, "checks": np.uint64}


@dataclass(frozen=True)
class Part:
    """A token file with the boundaries of its sequences.

    Attributes:
        shard: the file as the manifest will name it.
        pieces: document pieces of each sequence.
        ends: where each piece ends in its sequence, those of all sequences in order.
        trained: tokens that each sequence trains.
        checks: of each sequence; see hashing.sequence_check.
    """

    shard: Shard
    pieces: NDArray[np.int32]
    ends: NDArray[np.int32]
    trained: NDArray[np.int32]
    checks: NDArray[np.uint64]


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

    def write(self, data: bytes) -> None:
        """Append."""
        self._file.write(data)
        self._digest.update(data)

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
                vocabulary, or a loss mask where the first sequence has none (or the other way round).
        """
        name = f"{self.domain}/tokens-{number:05d}.bin"
        (self.root / self.domain).mkdir(parents=True, exist_ok=True)
        pieces, ends, trained, checks = array("i"), array("i"), array("i"), array("Q")
        masks: HashedFile | None = None
        with HashedFile(self.root, name) as tokens, ExitStack() as stack:
            for place, sequence in enumerate(sequences):
                where = f"sequence {place} of {name}"
                row, mask = self._checked(sequence, where), None
                tokens.write(row.tobytes())
                if place == 0 and sequence.loss_mask is not None:
                    masks = stack.enter_context(HashedFile(self.root, name.replace("/tokens-", "/mask-")))
                if (sequence.loss_mask is not None) != (masks is not None):
                    raise UserError(f"{where} and the first one do not both have a loss mask; give it to all or none")
                if masks is not None and sequence.loss_mask is not None:
                    mask = self._packed_mask(sequence.loss_mask, where)
                    masks.write(mask.tobytes())
                pieces.append(len(sequence.ends))
                ends.extend(sequence.ends.tolist())
                trained.append(sequence.trained_tokens)
                checks.append(sequence_check(row, mask, sequence.ends))
        shard = Shard(**asdict(tokens.stored), sequences=len(pieces), mask=masks.stored if masks else None)
        found = zip((pieces, ends, trained, checks), COUNTS.values(), strict=True)
        return Part(shard, *(np.array(counts, dtype=dtype) for counts, dtype in found))

    def record(self, number: int, part: Part) -> None:
        """Say on disk that part ``number`` is whole."""
        counts = {name: getattr(part, name).tolist() for name in COUNTS}
        write_atomically(self._record(number), json.dumps({"shard": asdict(part.shard), **counts}) + "\n")

    def finished(self, number: int) -> Part | None:
        """Part ``number`` where its record says that it is whole and its files still have their sizes."""
        record = self._record(number)
        if not record.is_file():
            return None
        content = json.loads(record.read_text(encoding="utf-8"))
        shard = parse_shard(content["shard"])
        for stored in (shard, *([shard.mask] if shard.mask else [])):
            file = self.root / stored.file
            if not file.is_file() or file.stat().st_size != stored.bytes:
                return None
        return Part(shard, *(np.array(content[name], dtype=dtype) for name, dtype in COUNTS.items()))

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
        )

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
        return tokens.astype(token_dtype(self.vocab_size), copy=False)

    def _save(self, name: str, array: NDArray[np.generic]) -> StoredFile:
        path = self.root / self.domain / name
        np.save(path, array, allow_pickle=False)
        fsync_path(path)
        return StoredFile(f"{self.domain}/{name}", path.stat().st_size, sha256_of(path))


def clear_records(directory: Path) -> None:
    """Remove the records of a domain's parts, and the parts that are empty, once a manifest names the others."""
    for record in directory.glob("part-*.json"):
        shard = parse_shard(json.loads(record.read_text(encoding="utf-8"))["shard"])
        if not shard.sequences:
            (directory.parent / shard.file).unlink(missing_ok=True)
        record.unlink()
