"""What every rank writes of itself every few seconds, so that the others see whether it lives and where it is."""

from __future__ import annotations

import faulthandler
import json
import math
import os
import shutil
import socket
import sys
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from types import CodeType, FrameType

from ropewalk.errors import UserError
from ropewalk.training.distributed import log

BEAT = 10.0  # seconds between two heartbeats of a rank that is in time


@dataclass(frozen=True)
class Heartbeat:
    """What a rank's thread has last written of it.

    Attributes:
        beat: number, from 1 in each session.
        step: that it is in, or was in last.
        late: whether it finds that step too long itself.
        place: of the watched thread: "waits in FUNCTION" for a collective, else "is in FUNCTION (FILE:LINE)".
        host: where it runs.
        pid: of the process there.
    """

    beat: int
    step: int
    late: bool
    place: str
    host: str
    pid: int


class Heartbeats:
    """The files heartbeats/rank_R.txt: a heartbeat in JSON, the watched thread's stack, and if late all threads'."""

    def __init__(self, run_dir: Path, rank: int, world_size: int) -> None:
        """Args: of the run and of this rank; the thread that calls is the one whose place is told."""
        self.directory, self.rank, self.world_size = run_dir / "heartbeats", rank, world_size
        self._watched = threading.get_ident()
        self._beat, self._warned = 0, False

    def say(self, step: int, late: bool) -> None:
        """Write this rank's. One that cannot is taken for dead by the others, and says so here, once."""
        self._beat += 1
        path, calls = self._file(self.rank), self._calls()
        heartbeat = Heartbeat(self._beat, step, late, _place(calls), socket.gethostname(), os.getpid())
        try:
            path.parent.mkdir(exist_ok=True)
            with path.with_suffix(".partial").open("w") as file:
                file.write(json.dumps(asdict(heartbeat)) + "\n\nThe watched thread (most recent call first):\n")
                file.writelines(f'  File "{code.co_filename}", line {line} in {code.co_name}\n' for code, line in calls)
                if late:
                    file.write("\n")
                    file.flush()
                    faulthandler.dump_traceback(file, all_threads=True)
            path.with_suffix(".partial").replace(path)
        except OSError as error:
            if not self._warned:
                log(f"watchdog: rank {self.rank} could not write its heartbeat ({error})")
            self._warned = True

    def heard(self) -> list[Heartbeat | None]:
        """The last heartbeat of every rank; None where there is none."""
        return [_read(self._file(rank)) for rank in range(self.world_size)]

    def keep(self, directory: Path) -> None:
        """Copy all of them.

        Raises:
            OSError: where that cannot be.
        """
        directory.mkdir(parents=True, exist_ok=True)
        for rank in range(self.world_size):
            if self._file(rank).is_file():
                shutil.copyfile(self._file(rank), directory / self._file(rank).name)

    def end(self) -> None:
        """Take this rank's away, and with the last one the directory."""
        with suppress(OSError):
            self._file(self.rank).unlink()
            self.directory.rmdir()

    def _file(self, rank: int) -> Path:
        return self.directory / f"rank_{rank:05d}.txt"

    def _calls(self) -> list[tuple[CodeType, int]]:
        """The watched thread's stack, innermost call first, as code and line: frames would keep its tensors alive."""
        frame: FrameType | None = sys._current_frames().get(self._watched)
        calls = []
        while frame is not None:
            calls.append((frame.f_code, frame.f_lineno))
            frame = frame.f_back
        return calls


def check_only_writer(run_dir: Path, seconds: float = 2 * BEAT) -> None:
    """Refuse a run directory that another process trains in now: both would write the same steps.

    A heartbeat that was left behind by a process of this node that has ended costs nothing; another recent one is
    watched, and one that stands still counts for nothing. No lock: one could outlive a node that died.

    Args:
        run_dir: of the run.
        seconds: to watch it for.

    Raises:
        UserError: where a heartbeat goes on.
    """
    path = run_dir / "heartbeats" / "rank_00000.txt"
    first = _read(path)
    if first is None or _has_ended(first) or _age(path) > 3 * seconds:
        return
    until = time.monotonic() + seconds
    while (now := _read(path)) == first:
        if time.monotonic() > until:
            return
        time.sleep(0.2)
    if now is not None:
        raise UserError(
            f"run_dir={run_dir} is written by process {now.pid} on {now.host}, at step {now.step}; wait for it or end "
            "it, or choose another run_name"
        )


def _age(path: Path) -> float:
    try:
        return time.time() - path.stat().st_mtime
    except FileNotFoundError:  # taken away just now
        return math.inf


def _has_ended(heartbeat: Heartbeat) -> bool:
    """Whether its process is one of this node's and no more there."""
    if heartbeat.host != socket.gethostname():
        return False
    try:
        os.kill(heartbeat.pid, 0)
    except ProcessLookupError:
        return True
    except PermissionError:
        pass
    return False


def _read(path: Path) -> Heartbeat | None:
    try:
        return Heartbeat(**json.loads(path.read_text().partition("\n")[0]))
    except (OSError, ValueError, TypeError):
        return None


def _place(calls: Sequence[tuple[CodeType, int]]) -> str:
    """See Heartbeat."""
    if not calls:
        return "has ended"
    waits = next((code for code, _ in calls if _is_collective(code)), None)
    if waits is not None:
        return f"waits in {waits.co_name}"
    innermost, line = calls[0]
    return f"is in {innermost.co_name} ({innermost.co_filename}:{line})"


def _is_collective(code: CodeType) -> bool:
    """Whether it waits for other ranks: torch's own functions, DeepSpeed's, and the handles that ZeRO-3 waits on."""
    file = code.co_filename
    return (
        "torch/distributed/" in file or "deepspeed/comm/" in file or ("deepspeed/" in file and code.co_name == "wait")
    )
