"""One token file of a domain at a time: written and hashed by itself, put together at the end.

A part can be made by any process in any order; its record, written last, says that it is whole.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ropewalk.data.manifest import DomainInfo, Shard, StoredFile, check_domain_name
from ropewalk.data.store import TOKEN_DTYPE, PackedSequence
from ropewalk.files import fsync_path, sha256_of, write_atomically


@dataclass(frozen=True)
class Part:
    """A token file with the boundaries of its sequences.

    Attributes:
        shard: the file as the manifest will name it.
        pieces: document pieces of each sequence.
        ends: where each piece ends in its sequence, those of all sequences in order.
    """

    shard: Shard
    pieces: list[int]
    ends: list[int]


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
            ValueError: for a sequence of another length, boundaries that do not increase, or a token outside the
                vocabulary.
        """
        path = self.root / self.domain / f"tokens-{number:05d}.bin"
        path.parent.mkdir(parents=True, exist_ok=True)
        digest, pieces, ends = hashlib.sha256(), [], []
        with path.open("wb") as file:
            for place, sequence in enumerate(sequences):
                data = self._checked(sequence, f"sequence {place} of {self.domain}/{path.name}").tobytes()
                file.write(data)
                digest.update(data)
                pieces.append(len(sequence.ends))
                ends += sequence.ends.tolist()
        fsync_path(path)
        shard = Shard(f"{self.domain}/{path.name}", path.stat().st_size, digest.hexdigest(), len(pieces))
        return Part(shard, pieces, ends)

    def record(self, number: int, part: Part) -> None:
        """Say on disk that part ``number`` is whole."""
        write_atomically(self._record(number), json.dumps(asdict(part)) + "\n")

    def finished(self, number: int) -> Part | None:
        """Part ``number`` where its record says that it is whole and its file still has its size."""
        record = self._record(number)
        if not record.is_file():
            return None
        content = json.loads(record.read_text(encoding="utf-8"))
        shard = Shard(**content["shard"])
        file = self.root / shard.file
        if not file.is_file() or file.stat().st_size != shard.bytes:
            return None
        return Part(shard, content["pieces"], content["ends"])

    def assemble(self, parts: Sequence[Part]) -> DomainInfo:
        """The index files of the domain and its entry in the manifest; records of parts are removed."""
        directory = self.root / self.domain
        directory.mkdir(parents=True, exist_ok=True)
        pieces = np.array([count for part in parts for count in part.pieces], dtype=np.int64)
        ends = np.array([end for part in parts for end in part.ends], dtype=np.int64)
        offsets = np.concatenate([[0], np.cumsum(pieces)])
        tokens = int(ends[offsets[1:] - 1].sum())
        stored = self._save("offsets.npy", offsets.astype("<i8")), self._save("ends.npy", ends.astype("<i4"))
        for record in directory.glob("part-*.json"):
            record.unlink()
        fsync_path(directory)
        return DomainInfo(
            sequences=len(pieces),
            documents=len(ends),
            tokens=tokens,
            trained_tokens=tokens - len(ends),
            padding=len(pieces) * self.sequence_length - tokens,
            shards=tuple(part.shard for part in parts),
            offsets=stored[0],
            ends=stored[1],
        )

    def _record(self, number: int) -> Path:
        return self.root / self.domain / f"part-{number:05d}.json"

    def _checked(self, sequence: PackedSequence, where: str) -> NDArray[np.uint32]:
        """The tokens as they are written."""
        tokens, ends = sequence.tokens, sequence.ends
        if tokens.shape != (self.sequence_length,):
            raise ValueError(f"{where} has the shape {tokens.shape}; give it ({self.sequence_length},)")
        if len(ends) == 0 or ends[-1] > self.sequence_length or np.any(np.diff(ends, prepend=0) < 1):
            raise ValueError(
                f"{where} has the ends {ends}; they must increase from 1 to at most {self.sequence_length}"
            )
        if (largest := int(tokens.max())) >= self.vocab_size:
            raise ValueError(f"{where} has token {largest}, the tokenizer has {self.vocab_size}; use its own tokenizer")
        return tokens.astype(TOKEN_DTYPE, copy=False)

    def _save(self, name: str, array: NDArray[np.generic]) -> StoredFile:
        path = self.root / self.domain / name
        np.save(path, array, allow_pickle=False)
        fsync_path(path)
        return StoredFile(f"{self.domain}/{name}", path.stat().st_size, sha256_of(path))
