"""What every rank writes of itself every few seconds, so that the others see whether it lives and where it is."""

from __future__ import annotations

import faulthandler
import json
import os
import shutil
import socket
import sys
import threading
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from types import CodeType, FrameType

from ropewalk.training.terminal import tell


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
    """The files heartbeats/rank_R.txt of a run: a heartbeat in JSON, then the stacks of all the rank's threads."""

    def __init__(self, run_dir: Path, rank: int, world_size: int) -> None:
        """Args: of the run and of this rank; the thread that calls is the one whose place is told."""
        self.directory, self.rank, self.world_size = run_dir / "heartbeats", rank, world_size
        self._watched = threading.get_ident()
        self._beat, self._warned = 0, False

    def say(self, step: int, late: bool) -> None:
        """Write this rank's. One that cannot is taken for dead by the others, and says so here, once."""
        self._beat += 1
        path = self._file(self.rank)
        heartbeat = Heartbeat(self._beat, step, late, self._place(), socket.gethostname(), os.getpid())
        try:
            path.parent.mkdir(exist_ok=True)
            with path.with_suffix(".partial").open("w") as file:
                file.write(json.dumps(asdict(heartbeat)) + "\n\n")
                file.flush()
                faulthandler.dump_traceback(file, all_threads=True)
            path.with_suffix(".partial").replace(path)
        except OSError as error:
            if not self._warned:
                tell(f"watchdog: rank {self.rank} could not write its heartbeat ({error})")
            self._warned = True

    def heard(self) -> list[Heartbeat | None]:
        """The last heartbeat of every rank; None where there is none."""
        heard: list[Heartbeat | None] = []
        for rank in range(self.world_size):
            try:
                heard.append(Heartbeat(**json.loads(self._file(rank).read_text().partition("\n")[0])))
            except (OSError, ValueError, TypeError):
                heard.append(None)
        return heard

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

    def _place(self) -> str:
        frame: FrameType | None = sys._current_frames().get(self._watched)
        if frame is None:
            return "has ended"
        innermost = frame
        while frame is not None:
            if _is_collective(frame.f_code):
                return f"waits in {frame.f_code.co_name}"
            frame = frame.f_back
        return f"is in {innermost.f_code.co_name} ({innermost.f_code.co_filename}:{innermost.f_lineno})"


def _is_collective(code: CodeType) -> bool:
    """Whether it waits for other ranks: torch's own functions, DeepSpeed's, and the handles that ZeRO-3 waits on."""
    file = code.co_filename
    return (
        "torch/distributed/" in file or "deepspeed/comm/" in file or ("deepspeed/" in file and code.co_name == "wait")
    )
