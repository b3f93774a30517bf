"""A bounded directory of downloaded files that several processes share."""

from __future__ import annotations

import fcntl
import hashlib
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from ropewalk.data.store.hashing import sha256_text
from ropewalk.errors import UserError
from ropewalk.files import fsync_path

CHUNK = 2**23  # bytes copied at once
POLL = 0.05  # seconds between looks for room
BOUNDED = ".bin"  # files that count and are deleted for room: tokens and masks; what else there is, is small, and stays
PARTIAL = ".partial"


class DownloadCache:
    """Files that are whole and checked, or not there; those used longest ago make room for new ones.

    A file is downloaded beside its place, hashed on the way, and renamed into it. Locks (flock, so the directory
    belongs on a disk of the node) keep two processes from downloading the same file, and are let go by the system when
    a process dies. A file may be deleted as soon as it was fetched: open it, and fetch it again where it is gone;
    what is mapped already stays readable, its space comes back when it is let go.
    """

    def __init__(self, directory: str | Path, max_bytes: int) -> None:
        """Open the cache in ``directory``, made if needed, for at most ``max_bytes`` of bounded files."""
        self.directory = Path(directory)
        self.max_bytes = max_bytes
        (self.directory / "locks").mkdir(parents=True, exist_ok=True)

    def fetch(self, name: str, size: int, sha256: str, source: str, open_source: Callable[[], BinaryIO]) -> bool:
        """Have the file ``name`` (a path in the cache) in place, and mark it as used now.

        Args:
            name: path under the directory.
            size: bytes it must have.
            sha256: that it must have.
            source: where it comes from, for messages.
            open_source: opens it for reading.

        Returns:
            Whether it was downloaded.

        Raises:
            UserError: for a file larger than the cache, or one that is not as the manifest says; nothing is kept.
        """
        if self._use(name, size):
            return False
        bounded = name.endswith(BOUNDED)
        if bounded and size > self.max_bytes:
            raise UserError(
                f"{source} has {size} bytes and the cache {self.directory} may hold {self.max_bytes}; raise "
                f"data.cache_gib to {size / 2**30:.3g} or more"
            )
        with self.locked(name):
            if self._use(name, size):  # by the process that held the lock
                return False
            path = self.directory / name
            partial = path.with_name(path.name + PARTIAL)
            path.parent.mkdir(parents=True, exist_ok=True)
            partial.unlink(missing_ok=True)  # of a process that died
            self._reserve(partial, size if bounded else 0)
            try:
                _download(partial, size, sha256, source, open_source)
                _touch(partial)
                partial.replace(path)
            finally:
                partial.unlink(missing_ok=True)
            fsync_path(path.parent)
        return True

    @contextmanager
    def locked(self, name: str) -> Iterator[None]:
        """Hold the lock of ``name`` against every other process and thread."""
        with self._lock_path(name).open("a", encoding="utf-8") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield

    def _lock_path(self, name: str) -> Path:
        return self.directory / "locks" / sha256_text(name)[:32]

    def _use(self, name: str, size: int) -> bool:
        path = self.directory / name
        try:
            _touch(path)
            return path.stat().st_size == size
        except FileNotFoundError:
            return False

    def _reserve(self, partial: Path, size: int) -> None:
        """Make room for a bounded file and take it; waits where other processes' downloads fill the cache."""
        while True:
            with self.locked(""):
                if not size or self._make_room(size):
                    partial.touch()
                    os.truncate(partial, size)  # counted from now on
                    return
            time.sleep(POLL)

    def _make_room(self, size: int) -> bool:
        """Delete bounded files, those used longest ago first, until ``size`` more fit; whether they do."""
        found = []
        for path in self.directory.rglob(f"*{BOUNDED}*"):
            with suppress(FileNotFoundError):  # renamed or deleted meanwhile
                status = path.stat()
                found.append((status.st_mtime_ns, status.st_size, path))
        excess = sum(entry[1] for entry in found) + size - self.max_bytes
        for _, freed, path in sorted(found):
            if excess <= 0:
                break
            if path.name.endswith(PARTIAL) and not self._abandoned(path):
                continue
            path.unlink(missing_ok=True)
            excess -= freed
        return excess <= 0

    def _abandoned(self, partial: Path) -> bool:
        """True if the process that was downloading has died: its lock is free."""
        name = str(partial.relative_to(self.directory)).removesuffix(PARTIAL)
        with self._lock_path(name).open("a", encoding="utf-8") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                return False
        return True


def _touch(path: Path) -> None:
    """Mark a file as used now; the system's own stamp is too coarse to tell uses of the same millisecond apart."""
    now = time.time_ns()
    os.utime(path, ns=(now, now))


def _download(partial: Path, size: int, sha256: str, source: str, open_source: Callable[[], BinaryIO]) -> None:
    digest, copied = hashlib.sha256(), 0
    with open_source() as remote, partial.open("r+b") as local:
        while chunk := remote.read(CHUNK):
            copied += len(chunk)
            if copied > size:
                break
            digest.update(chunk)
            local.write(chunk)
    if copied != size or digest.hexdigest() != sha256:
        found = f"SHA-256 {digest.hexdigest()}" if copied == size else f"{'more' if copied > size else copied} bytes"
        raise UserError(
            f"{source} has {found}, its manifest says {sha256 if copied == size else f'{size} bytes'}; copy the store "
            "there again"
        )
    fsync_path(partial)
