"""Writing token sequences in MosaicML's MDS format, version 2, for trainers that read it."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ropewalk.data.mds.mds_reader import INDEX
from ropewalk.files import fsync_path, write_atomically

SHARD_BYTES = 2**26
# In the order of their bytes, which is that of their names.
COLUMNS = {"domain": "str", "indices": "ndarray:uint32", "input_ids": "ndarray:uint32", "length": "int"}
MASKED_COLUMNS = {**COLUMNS, "mask": "ndarray:uint8"}
_SHAPE_WIDTHS = ((2**8, 0, "u1"), (2**16, 1, "<u2"), (2**32, 2, "<u4"))


def write_mds(directory: Path, samples: Iterable[Mapping[str, Any]]) -> None:
    """Write samples with ProLong's columns as an MDS directory; index.json comes last, so without it there is none.

    Args:
        directory: what an unfinished writing left there is replaced.
        samples: ``input_ids`` uint32 (n,), ``indices`` uint32 (pieces, 2), ``length``, ``domain``, and
            in all or none ``mask`` uint8 (n,).
    """
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir(parents=True)
    shards: list[dict[str, Any]] = []
    encoded: list[bytes] = []
    columns = COLUMNS
    size = 0
    for number, sample in enumerate(samples):
        if number == 0 and "mask" in sample:
            columns = MASKED_COLUMNS
        data = _encode(sample, columns)
        if encoded and size + len(data) + 4 > SHARD_BYTES:
            shards.append(_write_shard(directory, len(shards), encoded, columns))
            encoded, size = [], 0
        encoded.append(data)
        size += len(data) + 4
    if encoded:
        shards.append(_write_shard(directory, len(shards), encoded, columns))
    fsync_path(directory)
    write_atomically(directory / INDEX, json.dumps({"shards": shards, "version": 2}) + "\n")


def _encode(sample: Mapping[str, Any], columns: Mapping[str, str]) -> bytes:
    """Sizes of the columns that vary, then the values."""
    values = {
        "domain": str(sample["domain"]).encode(),
        "indices": _array(np.asarray(sample["indices"], "<u4")),
        "input_ids": _array(np.asarray(sample["input_ids"], "<u4")),
        "length": np.int64(sample["length"]).tobytes(),
    }
    if "mask" in columns:
        values["mask"] = _array(np.asarray(sample["mask"], np.uint8))
    sizes = [np.uint32(len(values[name])).tobytes() for name in columns if name != "length"]
    return b"".join([*sizes, *values.values()])


def _array(array: np.ndarray) -> bytes:
    """[rank and width of the shape] [shape] [values]."""
    width, dtype = next((code, dtype) for limit, code, dtype in _SHAPE_WIDTHS if max(array.shape) < limit)
    return bytes([array.ndim << 2 | width]) + np.array(array.shape, dtype).tobytes() + array.tobytes()


def _write_shard(directory: Path, number: int, encoded: list[bytes], columns: Mapping[str, str]) -> dict[str, Any]:
    settings = {
        "column_encodings": list(columns.values()),
        "column_names": list(columns),
        "column_sizes": [8 if name == "length" else None for name in columns],
        "compression": None,
        "format": "mds",
        "hashes": ["sha256"],
        "size_limit": SHARD_BYTES,
        "version": 2,
    }
    head = json.dumps(settings, sort_keys=True).encode()
    start = 4 * (len(encoded) + 2) + len(head)
    offsets = np.cumsum([start, *map(len, encoded)], dtype="<u4")
    data = b"".join([np.uint32(len(encoded)).tobytes(), offsets.tobytes(), head, *encoded])
    path = directory / f"shard.{number:05d}.mds"
    path.write_bytes(data)
    fsync_path(path)
    raw = {"basename": path.name, "bytes": len(data), "hashes": {"sha256": hashlib.sha256(data).hexdigest()}}
    return {**settings, "raw_data": raw, "samples": len(encoded), "zip_data": None}
