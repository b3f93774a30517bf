"""One task of a job: ``python -m ropewalk.cluster.slurm.rank RECORD SCRIPT ARGUMENTS``.

Runs ``python SCRIPT ARGUMENTS`` in this very process, so that a signal to the task reaches the run, and notes in
RECORD/ranks which process on which node it is and how it ended. A rank that was killed leaves a note without an end.
"""

from __future__ import annotations

import json
import os
import runpy
import socket
import sys
import time
from pathlib import Path
from typing import Any

from ropewalk.runs.directory import JobRecord
from ropewalk.runs.launch import hold_warnings, take_place


class RankNote:
    """RECORD/ranks/rank-N.json; if it cannot be written, that is a warning and no error."""

    def __init__(self, record: Path) -> None:
        number = int(os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0")))
        self.path = JobRecord(record).rank(number)
        node = os.environ.get("SLURMD_NODENAME") or socket.gethostname()
        self.words: dict[str, Any] = {"rank": number, "node": node, "pid": os.getpid(), "started": time.time()}
        self._write()

    def end(self, code: int, error: str | None) -> None:
        """Add how it ended."""
        self.words |= {"code": code, "error": error, "ended": time.time()}
        self._write()

    def _write(self) -> None:
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            partial = self.path.with_suffix(".partial")
            partial.write_text(json.dumps(self.words) + "\n", encoding="utf-8")
            partial.replace(self.path)
        except OSError as error:
            print(f"warning: {self.path} could not be written ({error})", file=sys.stderr, flush=True)


def run(record: Path, script: str, arguments: list[str]) -> None:
    """Run a script as ``__main__``; every exit and exception of it goes on to the caller, noted."""
    hold_warnings()
    take_place()
    for name in ("TMPDIR", "TRITON_CACHE_DIR", "TORCHINDUCTOR_CACHE_DIR", "TORCH_EXTENSIONS_DIR"):
        if name in os.environ:  # on this node's own disk, where only its ranks can make them
            Path(os.environ[name]).mkdir(parents=True, exist_ok=True, mode=0o700)
    note = RankNote(record)
    sys.argv = [script, *arguments]
    try:
        runpy.run_path(script, run_name="__main__")
    except SystemExit as left:
        note.end(left.code if isinstance(left.code, int) else int(left.code is not None), None)
        raise
    except BaseException as error:
        note.end(1, f"{type(error).__name__}: {' '.join(str(error).split())[:500]}")
        raise
    note.end(0, None)


if __name__ == "__main__":
    run(Path(sys.argv[1]), sys.argv[2], sys.argv[3:])
