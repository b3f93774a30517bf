"""Tokenized documents between the two stages: a flat file of tokens, where each document ends, perhaps masks.

They are not pushed to the disk, as they are needed for hours at most: the record has a digest of them, and what a dead
machine has lost is noticed when they are opened.
"""

from __future__ import annotations

import json
from array import array
from bisect import bisect_right
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import xxhash
from numpy.typing import NDArray

from ropewalk.errors import UserError


@dataclass
class TokenRecord:
    """Record of a tokenized shard of raw documents; on disk, it says that the shard's files are whole.

    Attributes:
        source: place in the list of sources.
        domain: of its documents.
        documents: how many are in the file.
        tokens: in the file.
        text_bytes: of these documents, in UTF-8.
        masked: whether there are loss masks.
        engine: what encoded them.
        digest: xxh3 of tokens, masks and ends, to find what was lost.
        skipped: documents left out, by reason.
        first: reason -> file and row of the first of them.
        unused: fields of messages that the chat template does not use, and how many had each.
        unread: columns of conversations that are not read, and how many had each.
    """

    source: int
    domain: str
    documents: int = 0
    tokens: int = 0
    text_bytes: int = 0
    masked: bool = False
    engine: str = ""
    digest: str = ""
    skipped: dict[str, int] = field(default_factory=dict)
    first: dict[str, str] = field(default_factory=dict)
    unused: dict[str, int] = field(default_factory=dict)
    unread: dict[str, int] = field(default_factory=dict)


class BadRow(Exception):
    """A row that cannot be used.

    Args:
        kind: of its fault, the same for many rows.
        detail: of this one.
    """

    def __init__(self, kind: str, detail: str = "") -> None:
        super().__init__(kind)
        self.detail = detail


class Skipped(Counter[str]):
    """Documents left out, by reason.

    Attributes:
        first: reason -> file and row of the first one.
        strict: raise an error for it instead.
    """

    def __init__(self, strict: bool = False) -> None:
        super().__init__()
        self.first: dict[str, str] = {}
        self.strict = strict

    def leave_out(self, bad: BadRow, where: str) -> None:
        """Count one.

        Raises:
            UserError: with ``strict``.
        """
        kind, where = str(bad), f"{where} ({bad.detail})" if bad.detail else where
        if self.strict:
            raise UserError(f"{where}: {kind}; correct it, or set corpus.bad_rows=skip to leave such rows out")
        self[kind] += 1
        self.first.setdefault(kind, where)


def check_unicode(text: str) -> None:
    """Check that a text can be written in UTF-8.

    Raises:
        BadRow: for a lone surrogate.
    """
    try:
        text.encode()
    except UnicodeEncodeError:
        raise BadRow("not valid Unicode (a lone surrogate)") from None


class TokenFileWriter:
    """Writes the files of one shard; they count once ``commit`` has written the record."""

    def __init__(self, directory: Path, number: int, record: TokenRecord) -> None:
        """Replace the files of shard ``number``."""
        self._stem = directory / f"tokens-{number:05d}"
        self._record = record
        self._stem.with_suffix(".json").unlink(missing_ok=True)  # it may speak of files that another call damaged
        self._tokens = self._stem.with_suffix(".bin").open("wb")
        self._masks = self._stem.with_suffix(".mask").open("wb") if record.masked else None
        self._ends = array("q")
        self._digests = _digests()

    def __enter__(self) -> TokenFileWriter:
        return self

    def __exit__(self, *error: object) -> None:
        self._tokens.close()
        if self._masks is not None:
            self._masks.close()

    def write(self, tokens: NDArray[np.uint32], mask: NDArray[np.bool_] | None = None) -> None:
        """Add to the document at the end of the file."""
        self._add(self._tokens, ".bin", tokens.astype("<u4", copy=False))
        self._record.tokens += len(tokens)
        if self._masks is not None:
            assert mask is not None
            self._add(self._masks, ".mask", mask)

    def _add(self, file: BinaryIO, suffix: str, values: NDArray[Any]) -> None:
        content = np.ascontiguousarray(values).view(np.uint8).data
        self._digests[suffix].update(content)
        file.write(content)

    def end_document(self) -> None:
        """Close a document: the next tokens are of another one."""
        self._ends.append(self._record.tokens)

    def commit(self) -> TokenRecord:
        """Close the files, and say that they are whole."""
        self.__exit__()
        self._record.documents = len(self._ends)
        ends = np.array(self._ends, dtype=np.int64)
        np.save(self._stem.with_suffix(".npy"), ends, allow_pickle=False)
        self._digests[".npy"].update(ends.tobytes())
        self._record.digest = _joined(self._digests)
        partial = self._stem.with_suffix(".json.partial")
        partial.write_text(json.dumps(asdict(self._record)) + "\n", encoding="utf-8")
        partial.replace(self._stem.with_suffix(".json"))
        return self._record


def read_record(directory: Path, number: int) -> TokenRecord | None:
    """The record of a shard, or None where it is not finished."""
    stem = directory / f"tokens-{number:05d}"
    if not stem.with_suffix(".json").is_file():
        return None
    try:
        record = TokenRecord(**json.loads(stem.with_suffix(".json").read_text(encoding="utf-8")))
    except json.JSONDecodeError:  # the machine died before it was on the disk
        return None
    path = stem.with_suffix(".bin")
    return record if path.is_file() and path.stat().st_size == 4 * record.tokens else None


class FlatDocuments:
    """Documents that lie one after the other in flat arrays, mapped or not; ``documents[i]`` is one, not copied."""

    def __init__(self, flats: Sequence[NDArray[Any]], ends: Sequence[NDArray[np.int64]]) -> None:
        """Take flat arrays and, for each, where its documents end in it."""
        self._flats, self._ends = list(flats), list(ends)
        self._first = [0, *np.cumsum([len(counts) for counts in ends], dtype=np.int64).tolist()]

    @classmethod
    def of(cls, documents: Sequence[NDArray[Any]]) -> FlatDocuments:
        """A copy of ``documents`` in one flat array."""
        lengths = [len(document) for document in documents]
        flat = np.concatenate(documents) if documents else np.zeros(0, np.uint32)
        return cls([flat], [np.cumsum(lengths, dtype=np.int64)])

    def __len__(self) -> int:
        return self._first[-1]

    def __getitem__(self, index: int) -> NDArray[Any]:
        file = bisect_right(self._first, index) - 1
        ends, number = self._ends[file], index - self._first[file]
        return self._flats[file][int(ends[number - 1]) if number else 0 : int(ends[number])]

    def __add__(self, other: FlatDocuments) -> FlatDocuments:
        return FlatDocuments([*self._flats, *other._flats], [*self._ends, *other._ends])

    @property
    def lengths(self) -> NDArray[np.int64]:
        """Tokens of each document, int64 (documents,)."""
        none = np.zeros(0, dtype=np.int64)
        return np.concatenate([none, *(np.diff(ends, prepend=0) for ends in self._ends)])


def check_whole(directory: Path, number: int) -> None:
    """Compare the files of a finished shard with their record.

    Raises:
        UserError: where they are not what was written.
    """
    stem = directory / f"tokens-{number:05d}"
    record, digests = read_record(directory, number), _digests()
    assert record is not None
    for suffix in (".bin", *([".mask"] if record.masked else [])):
        with stem.with_suffix(suffix).open("rb") as file:
            while block := file.read(2**22):
                digests[suffix].update(block)
    digests[".npy"].update(np.load(stem.with_suffix(".npy"), allow_pickle=False).tobytes())
    if _joined(digests) != record.digest:
        raise UserError(
            f"{stem}.bin, .mask or .npy is not what was written: the disk, or the machine, has failed; remove "
            f"{stem}.json and start again, and this shard is tokenized again"
        )


def _digests() -> dict[str, Any]:
    return {suffix: xxhash.xxh3_64() for suffix in (".bin", ".mask", ".npy")}


def _joined(digests: Mapping[str, Any]) -> str:
    return "-".join(digest.hexdigest() for digest in digests.values())


def open_tokens(directory: Path, numbers: Sequence[int]) -> FlatDocuments:
    """The documents of finished shards, mapped."""
    return _open(directory, numbers, ".bin", np.dtype("<u4"))


def open_masks(directory: Path, numbers: Sequence[int]) -> FlatDocuments:
    """Their loss masks."""
    return _open(directory, numbers, ".mask", np.dtype(np.bool_))


def _open(directory: Path, numbers: Sequence[int], suffix: str, dtype: np.dtype[Any]) -> FlatDocuments:
    flats, ends = [], []
    for number in numbers:
        stem = directory / f"tokens-{number:05d}"
        path = stem.with_suffix(suffix)
        flats.append(np.memmap(path, dtype, mode="r") if path.stat().st_size else np.zeros(0, dtype))
        ends.append(np.load(stem.with_suffix(".npy"), allow_pickle=False))
    return FlatDocuments(flats, ends)
