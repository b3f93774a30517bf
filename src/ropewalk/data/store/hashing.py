"""Hashes and randomness that are the same on every machine and in every library version."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ropewalk.files import sha256_of

GAMMA = np.uint64(0x9E3779B97F4A7C15)  # splitmix64's increment


def stable_key(*parts: str | int) -> int:
    """A 64-bit key of ``parts``: the first eight bytes, little endian, of the SHA-256 of their JSON."""
    digest = hashlib.sha256(json.dumps(parts).encode()).digest()
    return int.from_bytes(digest[:8], "little")


def splitmix64(key: int, count: int) -> NDArray[np.uint64]:
    """The first ``count`` outputs, uint64 (count,), of the splitmix64 generator seeded with ``key``.

    Steele, Lea and Flood, "Fast splittable pseudorandom number generators", OOPSLA 2014.
    """
    return mixed(np.uint64(key % 2**64) + np.arange(1, count + 1, dtype=np.uint64) * GAMMA)


def mixed(state: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """splitmix64's finaliser of each state."""
    state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return state ^ (state >> np.uint64(31))


def permutation(count: int, *parts: str | int) -> NDArray[np.int64]:
    """A permutation of ``range(count)``, int64 (count,), that ``parts`` alone determine."""
    return np.argsort(splitmix64(stable_key(*parts), count), kind="stable")


def canonical_json(content: object) -> str:
    """``content`` as JSON with sorted keys and no spaces: the form that fingerprints are taken of."""
    return json.dumps(content, sort_keys=True, separators=(",", ":"), ensure_ascii=False)


def sha256_text(text: str) -> str:
    """SHA-256 of ``text`` in UTF-8, as hexadecimal."""
    return hashlib.sha256(text.encode()).hexdigest()


def files_signature(directory: Path) -> tuple[tuple[str, int, int], ...]:
    """Names, sizes and times of the files in ``directory``: what a process tells them by without reading them again."""
    entries = ((entry.name, entry.stat()) for entry in os.scandir(directory) if entry.is_file())
    return tuple(sorted((name, stat.st_size, stat.st_mtime_ns) for name, stat in entries))


def sha256_directory(directory: Path) -> str:
    """SHA-256 over the names and contents of the files in ``directory`` (its subdirectories are not read)."""
    files = sorted(path for path in directory.iterdir() if path.is_file())
    return sha256_text(canonical_json([[path.name, sha256_of(path)] for path in files]))
