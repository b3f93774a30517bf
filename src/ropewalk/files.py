"""Durable writes, which leave the whole file or none, and checksums of files and of JSON."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ropewalk.errors import UserError


def fsync_path(path: Path) -> None:
    """Push a file, or the entries of a directory, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_atomically(path: Path, text: str) -> None:
    """Write ``text`` (UTF-8) beside ``path`` and rename it into place; durable on return."""
    replace_atomically(path, lambda partial: partial.write_text(text, encoding="utf-8"))


def replace_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Have ``write`` make a file beside ``path`` and rename it into place; durable on return."""
    partial = path.with_name(path.name + ".partial")
    write(partial)
    fsync_path(partial)
    partial.replace(path)
    fsync_path(path.parent)


def copy_data(source: Path, target: Path) -> None:
    """Copy a directory's files as data, not as modes: a read-only source leaves a copy that can be written again."""
    target.mkdir(parents=True, exist_ok=True)
    for entry in source.iterdir():
        copy = target / entry.name
        if entry.is_dir():
            copy_data(entry, copy)
        else:
            shutil.copyfile(entry, copy)


def sha256_of(path: Path) -> str:
    """Hexadecimal SHA-256 of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sha256_of_json(content: Any, *, compact: bool = False) -> str:
    """Hexadecimal SHA-256 of ``content`` as JSON with sorted keys, in ASCII.

    Args:
        content: what json takes.
        compact: no space after "," and ":". Hashes that are on disk already were made in one form or the other.
    """
    separators = (",", ":") if compact else (", ", ": ")
    return hashlib.sha256(json.dumps(content, sort_keys=True, separators=separators).encode()).hexdigest()


def blake3_of(path: Path) -> str:
    """Hexadecimal BLAKE3 (256 bits, as of b3sum) of a file's bytes; several times as fast as SHA-256, on every core."""
    from blake3 import blake3  # late: ropewalk.rope imports this module and needs numpy alone

    digest, buffer = blake3(max_threads=blake3.AUTO), bytearray(2**20)  # it stays in the cache
    with path.open("rb", buffering=0) as file:
        while count := file.readinto(buffer):
            digest.update(memoryview(buffer)[:count])
    return digest.hexdigest()


def inside(root: Path, name: str) -> Path:
    """``root / name``, or UserError where a name read from data leads out of ``root``."""
    path = root / name
    if not path.resolve().is_relative_to(root.resolve()):
        raise UserError(
            f"{name!r} leads out of {root}; the directory was tampered with or copied wrongly: do not use it"
        )
    return path
