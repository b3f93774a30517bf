"""Reading MosaicML's MDS format, version 2: random access to published data sets without the official package."""

from __future__ import annotations

import bz2
import gzip
import hashlib
import json
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import xxhash

from ropewalk.data.mds.mds_columns import column_decoder
from ropewalk.errors import UserError
from ropewalk.files import inside

INDEX = "index.json"
_PYARROW_CODECS = {"zstd": "zstd", "br": "brotli", "snappy": "snappy"}


@dataclass(frozen=True)
class FileInfo:
    """A shard's file as index.json names it: path under its directory, size in bytes, digests by algorithm."""

    basename: str
    bytes: int
    hashes: Mapping[str, str]


class MdsDataset(Sequence[dict[str, Any]]):
    """The samples of an MDS directory: ``dataset[i]`` is a mapping from column to value.

    Raw shards are mapped into memory; array values are read-only views of them. Compressed ones are decompressed in
    memory, the ``decompressed_shards`` last used being kept, so read those in order.
    """

    def __init__(self, root: Path, shards: Sequence[MdsShard], decompressed_shards: int) -> None:
        self.root = root
        self.shards = tuple(shards)
        self._first = list(accumulate((shard.samples for shard in self.shards), initial=0))
        self._open: OrderedDict[int, memoryview] = OrderedDict()
        self._kept = decompressed_shards

    @property
    def columns(self) -> dict[str, str]:
        """Column names with their encodings, as index.json writes them."""
        return dict(zip(self.shards[0].column_names, self.shards[0].column_encodings, strict=True))

    def __len__(self) -> int:
        return self._first[-1]

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        if not -len(self) <= index < len(self):
            raise IndexError(f"sample {index} is outside 0 .. {len(self) - 1}")
        index %= len(self)
        number = bisect_right(self._first, index) - 1
        return self.shards[number].sample(self._data(number), index - self._first[number])

    def __iter__(self) -> Iterator[dict[str, Any]]:
        for number, shard in enumerate(self.shards):
            data = self._data(number)
            for index in range(shard.samples):
                yield shard.sample(data, index)

    def _data(self, number: int) -> memoryview:
        if number in self._open:
            if self.shards[number].is_compressed:
                self._open.move_to_end(number)
            return self._open[number]
        data = self._open[number] = self.shards[number].load()
        compressed = [key for key in self._open if self.shards[key].is_compressed]
        if len(compressed) > self._kept:
            del self._open[compressed[0]]
        return data


@dataclass(frozen=True)
class MdsShard:
    """One shard as index.json describes it.

    Attributes:
        directory: where its files lie.
        samples: number of samples.
        column_names: columns, in the order of their bytes.
        column_encodings: encoding of each.
        column_sizes: bytes of each value, None where every sample says.
        compression: ``zstd``, ``br``, ``snappy``, ``gz`` or ``bz2``, perhaps with ``:level``; None: stored raw.
        raw_data: the raw file.
        zip_data: the compressed one.
        verify: compare digests when the shard is opened.
    """

    directory: Path
    samples: int
    column_names: tuple[str, ...]
    column_encodings: tuple[str, ...]
    column_sizes: tuple[int | None, ...]
    compression: str | None
    raw_data: FileInfo
    zip_data: FileInfo | None
    verify: bool

    @property
    def is_compressed(self) -> bool:
        """True if only the compressed file is there."""
        return self.zip_data is not None and not self._path(self.raw_data).is_file()

    @cached_property
    def _decoders(self) -> tuple[Any, ...]:
        return tuple(column_decoder(encoding) for encoding in self.column_encodings)

    def load(self) -> memoryview:
        """The shard's raw bytes, checked: mapped where the raw file is there, else decompressed.

        Raises:
            UserError: for a file that is missing, of another size, or of another digest.
        """
        if self.is_compressed and self.zip_data is not None:
            packed = self._checked(self.zip_data)
            data = memoryview(_decompress(packed, self.compression or "", self.raw_data.bytes, self.zip_data.basename))
            self._check(data, self.raw_data)
        else:
            data = self._checked(self.raw_data)
        offsets = self._offsets(data)
        if int(offsets[-1]) != len(data) or np.any(np.diff(offsets.astype(np.int64)) < 0):
            raise UserError(f"{self._path(self.raw_data)} is torn: its sample offsets do not end at its size")
        return data

    def sample(self, data: memoryview, index: int) -> dict[str, Any]:
        """Sample ``place`` of the shard whose bytes are ``data``."""
        begin, end = np.frombuffer(data, "<u4", 2, 4 * (1 + index)).tolist()
        sizes = list(self.column_sizes)
        for column, size in enumerate(sizes):
            if not size:
                sizes[column] = int.from_bytes(data[begin : begin + 4], "little")
                begin += 4
        if begin + sum(size or 0 for size in sizes) != end:
            raise UserError(f"sample {index} of {self._path(self.raw_data)} does not hold its columns; it is corrupt")
        values = {}
        for name, decode, size in zip(self.column_names, self._decoders, sizes, strict=True):
            values[name] = decode(data[begin : begin + (size or 0)])
            begin += size or 0
        return values

    def _offsets(self, data: memoryview) -> np.ndarray:
        count = int.from_bytes(data[:4], "little")
        if count != self.samples or len(data) < 4 * (count + 2):
            raise UserError(
                f"{self._path(self.raw_data)} holds {count} samples, its {INDEX} says {self.samples}; fetch it again"
            )
        return np.frombuffer(data, "<u4", count + 1, 4)

    def _path(self, info: FileInfo) -> Path:
        return inside(self.directory, info.basename)

    def _checked(self, info: FileInfo) -> memoryview:
        path = self._path(info)
        if not path.is_file():
            raise UserError(f"{path} is missing; fetch the shard, or all of {self.directory}, again")
        if path.stat().st_size != info.bytes:
            raise UserError(f"{path} has {path.stat().st_size} bytes, its {INDEX} says {info.bytes}; fetch it again")
        data = np.memmap(path, np.uint8, "r").data.toreadonly()
        self._check(data, info)
        return data

    def _check(self, data: memoryview, info: FileInfo) -> None:
        if len(data) != info.bytes:
            raise UserError(f"{info.basename} has {len(data)} bytes, its {INDEX} says {info.bytes}; fetch it again")
        for algorithm, expected in info.hashes.items() if self.verify else ():
            if _digest(algorithm, data) != expected:
                raise UserError(
                    f"{self.directory / info.basename} is corrupt: its {algorithm} is not the one in {INDEX}; fetch it "
                    "again"
                )


def open_mds(path: str | Path, *, verify: bool = True, decompressed_shards: int = 2) -> MdsDataset:
    """Open an MDS directory: one with an index.json, whose shards may lie in sub-folders.

    Args:
        path: the directory.
        verify: compare each shard's digests, where index.json has any, when it is first read.
        decompressed_shards: decompressed shards kept in memory at once.

    Raises:
        UserError: for a directory without a readable index.json, another format or version, columns that differ
            between shards, or an encoding that is not read here. A shard's own faults are named when it is read.
    """
    root = Path(path)
    file = root / INDEX
    if not file.is_file():
        below = sorted(str(subset.parent.relative_to(root)) for subset in root.glob(f"*/{INDEX}"))
        fix = f"open one of: {', '.join(below)}" if below else "name the directory that holds it"
        raise UserError(f"{root} has no {INDEX}, so it is not an MDS directory; {fix}")
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        shards = [_shard(root, entry, verify) for entry in content["shards"]]
    except (UnicodeDecodeError, json.JSONDecodeError, KeyError, TypeError) as error:
        raise UserError(f"{file} is torn or no MDS index ({error!r}); fetch it again") from error
    if not shards:
        raise UserError(f"{file} names no shard; there is nothing to read")
    for shard in shards:
        if (shard.column_names, shard.column_encodings) != (shards[0].column_names, shards[0].column_encodings):
            raise UserError(f"{file}: {shard.raw_data.basename} has other columns than the first shard")
        for encoding in shard.column_encodings:
            column_decoder(encoding)
    return MdsDataset(root, shards, decompressed_shards)


def _shard(root: Path, entry: Mapping[str, Any], verify: bool) -> MdsShard:
    if (entry["version"], entry["format"]) != (2, "mds"):
        raise UserError(
            f"{root / INDEX} has a shard of format {entry['format']!r}, version {entry['version']}; mds version 2 is "
            "read"
        )
    raw, packed = (FileInfo(**entry[key]) if entry.get(key) else None for key in ("raw_data", "zip_data"))
    if raw is None:
        raise TypeError("a shard without raw_data")
    return MdsShard(
        directory=root,
        samples=int(entry["samples"]),
        column_names=tuple(entry["column_names"]),
        column_encodings=tuple(entry["column_encodings"]),
        column_sizes=tuple(entry["column_sizes"]),
        compression=entry.get("compression"),
        raw_data=raw,
        zip_data=packed,
        verify=verify,
    )


def _decompress(data: memoryview, compression: str, size: int, name: str) -> bytes:
    """``data`` decompressed; the size that index.json promises bounds what is made of it."""
    kind = compression.split(":", maxsplit=1)[0]
    try:
        if kind in _PYARROW_CODECS:
            return pyarrow.decompress(data, size, _PYARROW_CODECS[kind], asbytes=True)
        if kind == "gz":
            return gzip.decompress(data)
        if kind == "bz2":
            return bz2.decompress(data)
    except (OSError, EOFError, pyarrow.ArrowException) as error:
        raise UserError(f"{name} is corrupt: it is no {kind} of {size} bytes ({error}); fetch it again") from error
    raise UserError(f"compression {compression!r} of {name} is not known; use one of: br, bz2, gz, snappy, zstd")


def _digest(algorithm: str, data: memoryview) -> str:
    if algorithm in hashlib.algorithms_available and not algorithm.startswith("shake"):
        return hashlib.new(algorithm, data).hexdigest()
    if algorithm in xxhash.algorithms_available:
        return str(getattr(xxhash, algorithm)(data).hexdigest())
    raise UserError(f"hash algorithm {algorithm!r} is not known; open with verify=False to read without checking")
