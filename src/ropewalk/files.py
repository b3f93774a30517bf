"""Files: durable writes, one writer of a directory, errors of a disk in one line, copies, and checksums."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from ropewalk.errors import UserError, in_one_line

OWNER = "owner.json"  # in a directory that is being written: host and process of the writer
BEAT = 10.0  # seconds between two renewals of its time
DEAD_AFTER = 120.0  # seconds without one
_MARGIN = 64 * 2**20  # bytes, for small files, and what others write meanwhile
_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EFBIG}  # errors of nothing but writing
_BARRED = {  # of reading as well
    errno.EACCES, errno.EPERM, errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.ENAMETOOLONG, errno.ESTALE,
}  # fmt: skip


def fsync_path(path: Path) -> None:
    """Push a file, or the entries of a directory, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def open_like_directory(path: Path) -> None:
    """Let those read and write a file who may do so in its directory: safetensors makes files for their owner alone."""
    path.chmod(path.parent.stat().st_mode & 0o666)


def write_atomically(path: Path, text: str) -> None:
    """Write ``text`` (UTF-8) beside ``path`` and rename it into place; durable on return."""
    replace_atomically(path, lambda partial: partial.write_text(text, encoding="utf-8"))


def replace_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Have ``write`` make a file beside ``path``, of a name of its own, and rename it into place; durable on return."""
    partial = path.with_name(f"{path.name}.{uuid.uuid4().hex[:8]}.partial")
    try:
        write(partial)
        fsync_path(partial)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
    fsync_path(path.parent)


def copy_files(source: Path, target: Path) -> None:
    """Copy the files of a directory, and those below it, as data: what may be read only there can be replaced here."""
    target.mkdir(parents=True, exist_ok=True)
    for path in source.iterdir():
        if path.is_dir():
            copy_files(path, target / path.name)
        else:
            shutil.copyfile(path, target / path.name)


def bytes_of(path: Path) -> int:
    """Size of a file, or of all files of a directory; 0: there is nothing."""
    files = path.rglob("*") if path.is_dir() else [path]
    return sum(file.stat().st_size for file in files if file.is_file())


@contextmanager
def writing(name: str, directory: Path, need: Callable[[], int] | None = None) -> Iterator[None]:
    """Make an error of a full or unwritable disk a UserError with the path and the space.

    Args:
        name: the setting that names the directory, with its value.
        directory: that is written.
        need: counts the bytes, about, that are written there; None: not known.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        code, where = (error.errno, error.filename) if isinstance(error, OSError) else (None, None)
        torn = "No space left" in str(error) or (isinstance(error, OSError) and " written" in str(error))
        barred = code in _BARRED and (where is None or _is_on_the_way(where, directory))
        if code not in _FULL and not barred and not torn:  # numpy, safetensors and tokenizers give no number
            raise
        reason = f"{getattr(error, 'strerror', None) or in_one_line(error)}: {where or directory}"
        raise _unwritable(name, reason, directory, None if need is None else need()) from error


def check_writable(name: str, path: Path) -> None:
    """Raise UserError where a file or directory cannot be made at ``path``, or nothing in the directory that is there.

    Args:
        name: the setting that names it, with its value.
        path: nothing is written to it.
    """
    nearest = next(parent for parent in (path.absolute(), *path.absolute().parents) if os.path.lexists(parent))
    if nearest == path.absolute() and not os.path.isdir(nearest):
        nearest = nearest.parent  # a file is replaced
    if not os.path.isdir(nearest):
        raise _unwritable(name, f"Not a directory: {nearest}", path, None)
    if not os.access(nearest, os.W_OK | os.X_OK):
        raise _unwritable(name, f"Permission denied: {nearest}", path, None)


def check_space(name: str, directory: Path, needed: int) -> None:
    """Raise UserError where the disk of a directory has less than ``needed`` bytes free, and some for what is small.

    Args:
        name: the setting that names the directory, with its value.
        directory: or one that will be made.
        needed: bytes.
    """
    if shutil.disk_usage(_standing(directory)).free < needed + _MARGIN:
        raise _unwritable(name, "the disk is too small", directory, needed)


def _unwritable(name: str, reason: str, directory: Path, needed: int | None) -> UserError:
    space = "" if needed is None else f"about {needed / 1e9:,.3g} GB needed, "
    free = shutil.disk_usage(_standing(directory)).free
    return UserError(
        f"{name} cannot be written ({reason}; {space}{free / 1e9:,.3g} GB free); free space there, or name another "
        "directory"
    )


def _standing(directory: Path) -> Path:
    # not Path.is_dir, which raises where a directory above may not be entered
    return next(path for path in (directory, *directory.absolute().parents) if os.path.isdir(path))


def _is_on_the_way(file: str | bytes, directory: Path) -> bool:
    """True if a file is in a directory, or in the ``NAME.*partial`` that becomes it, or is a part of its path."""
    path, root = Path(os.path.abspath(os.fsdecode(file))), Path(os.path.abspath(directory))
    if path.is_relative_to(root) or root.is_relative_to(path):
        return True
    beside = path.relative_to(root.parent).parts[:1] if path.is_relative_to(root.parent) else ()
    return any(name.startswith(f"{root.name}.") and name.endswith("partial") for name in beside)


@contextmanager
def only_writer(directory: Path, name: str, claim: str = OWNER) -> Iterator[None]:
    """Hold a directory against other writers, on every node that sees it.

    A file in it names this process, and its time is renewed while the context lasts. An owner whose process is gone
    from this node, or whose file was not renewed for two minutes, is dead: its directory is taken over, and that is
    printed.

    Args:
        directory: made if needed.
        name: the setting that names the directory, with its value, for messages.
        claim: name of the file; another one for each part that is written by itself.

    Raises:
        UserError: another process writes there.
    """
    path, me = directory / claim, _process()
    with writing(name, directory):
        directory.mkdir(parents=True, exist_ok=True)
        while True:
            try:
                with path.open("x", encoding="utf-8") as file:
                    file.write(json.dumps(me))
                break
            except FileExistsError:
                _take_over(path, name)
    ended = threading.Event()

    def renew() -> None:
        while not ended.wait(BEAT):
            if _owner(path) != me:
                return
            with suppress(OSError):
                os.utime(path)

    thread = threading.Thread(target=renew, name="only_writer", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
        if _owner(path) == me:
            path.unlink(missing_ok=True)


def is_in_use(directory: Path) -> bool:
    """True if a directory has more in it than only_writer and replace_atomically leave when a process is killed."""
    return any(not path.name.startswith(OWNER) and path.suffix != ".partial" for path in directory.iterdir())


def _take_over(path: Path, name: str) -> None:
    """Wait until an owner is known to live, or take the file of a dead one away.

    Raises:
        UserError: the owner lives.
    """
    owner, renewed = _owner(path), _time_of(path)
    begun, warned = time.monotonic(), False
    while not (_is_dead(owner, path) or time.monotonic() - begun > DEAD_AFTER):  # its clock may have been ahead
        live = owner is not None and owner["host"] == socket.gethostname()
        if live or _time_of(path) != renewed:
            if not path.exists():
                return
            raise UserError(
                f"{name} is being written by {_words(owner)}; wait for it or end it, or name another directory"
            )
        if not warned and time.monotonic() - begun > 1:
            print(f"{name}: {_words(owner)} has begun to write it; watched for a sign of life", flush=True)
            warned = True
        time.sleep(min(1.0, BEAT / 10))
        owner = owner or _owner(path)  # it had made its file, and not yet written its name
    dead = path.with_name(f"{path.name}.{uuid.uuid4().hex[:8]}")
    with suppress(FileNotFoundError):  # another has taken it
        path.rename(dead)
        if _owner(dead) != owner:  # of one that was as quick
            dead.rename(path)
            return
        dead.unlink()
        print(f"{name}: {_words(owner)}, which was writing it, is gone; its work is taken over", flush=True)


def _words(owner: dict[str, Any] | None) -> str:
    return f"process {owner['pid']} on {owner['host']}" if owner else "another process"


def _is_dead(owner: dict[str, Any] | None, path: Path) -> bool:
    if owner is not None and owner["host"] == socket.gethostname():
        return _started(owner["pid"]) != owner["started"]
    now = path.with_name(f"{path.name}.{uuid.uuid4().hex[:8]}")  # the time of the disk's own machine
    now.touch()
    age = (_time_of(now) or 0.0) - (_time_of(path) or 0.0)
    now.unlink()
    return age > DEAD_AFTER


def _process() -> dict[str, Any]:
    return {
        "host": socket.gethostname(), "pid": os.getpid(), "started": _started(os.getpid()), "id": uuid.uuid4().hex,
    }  # fmt: skip


def _started(pid: int) -> str | None:
    """When a process of this node began, in clock ticks since the node did; None: there is none, or it has ended."""
    if not Path("/proc/self/stat").exists():  # not Linux: a number that is used again is not told apart
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return None
        except PermissionError:
            pass
        return ""
    try:
        content = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None
    state, *numbers = content.rpartition(")")[2].split()
    return None if state in "ZX" else numbers[18]


def _owner(path: Path) -> dict[str, Any] | None:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def _time_of(path: Path) -> float | None:
    try:
        return path.stat().st_mtime
    except FileNotFoundError:
        return None


def read_object(path: Path) -> dict[str, Any]:
    """The JSON object in a file; empty where there is no file.

    Raises:
        UserError: it holds something else.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8-sig")) if path.is_file() else {}
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path} is not JSON ({in_one_line(error)}); correct it, or move it away") from error
    if not isinstance(content, dict):
        raise UserError(f"{path} is not a JSON object; correct it, or move it away")
    return content


def sha256_of(path: Path) -> str:
    """Hexadecimal SHA-256 of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sampled_sha256(path: Path) -> str:
    """Hexadecimal SHA-256 of a file's size and of 4 kB at 64 places.

    It tells the weights of two models of one shape apart. A change of a few weights alone it may miss.
    """
    size, block = path.stat().st_size, 4096
    digest = hashlib.sha256(str(size).encode())
    with path.open("rb") as file:
        for start in range(0, size, max(size // 64, block)):
            file.seek(start)
            digest.update(file.read(block))
    return digest.hexdigest()


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


def inside(root: Path, name: str, *, links: bool = False) -> Path:
    """``root / name``, or UserError where a name read from data leads out of ``root``.

    Args:
        root: directory.
        name: relative to it.
        links: a link in ``root`` may lead out of it, as each file of the hub's cache does.
    """
    path = root / name
    resolve = os.path.abspath if links else os.path.realpath
    if not Path(resolve(path)).is_relative_to(resolve(root)):
        raise UserError(
            f"{name!r} leads out of {root}; the directory was tampered with or copied wrongly: do not use it"
        )
    return path
