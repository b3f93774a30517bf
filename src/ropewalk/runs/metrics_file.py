"""Files of metrics rows: metrics.jsonl and evaluations.jsonl, one JSON object a line, in the order of steps."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from ropewalk.errors import UserError
from ropewalk.files import fsync_path, write_atomically
from ropewalk.runs.directory import RunDirectory


class MetricsFile:
    """A file of rows that a session adds to; rows past the checkpoint that it resumes from are dropped."""

    def __init__(self, path: Path, first_step: int, warn: Callable[[str], None]) -> None:
        """Open the file, made if it is missing.

        Args:
            path: of the file.
            first_step: steps in the checkpoint that the session resumes from.
            warn: takes a line for the terminal.

        Raises:
            UserError: from :func:`read_rows`.
            OSError: it cannot be written.
        """
        self.path, self.warn = path, warn
        kept = [row for row in read_rows(path) if row["step"] <= first_step]
        write_atomically(self.path, "".join(json.dumps(row) + "\n" for row in kept))
        self.unwritten = ""

    def append(self, row: dict[str, Any]) -> None:
        """Add one row. On a full disk it waits for the next: a lost row is not a reason to lose a run."""
        self.unwritten += json.dumps(row) + "\n"
        self._flush()

    def _flush(self) -> None:
        size: int | None = None
        try:
            size = self.path.stat().st_size
            with self.path.open("a", encoding="utf-8") as file:
                file.write(self.unwritten)
        except OSError as error:
            self.warn(f"warning: {self.path} could not be written ({error}); its rows are kept for later")
            if size is not None:
                with suppress(OSError):
                    os.truncate(self.path, size)  # half a row would spoil the next
        else:
            self.unwritten = ""

    def settle(self) -> None:
        """Flush all rows to the disk, or warn that they are not there."""
        if self.unwritten:
            self._flush()
        try:
            fsync_path(self.path)
        except OSError as error:
            self.warn(f"warning: {self.path} could not be written ({error})")


def read_metrics(run_dir: str | Path) -> list[dict[str, Any]]:
    """The rows of a run's metrics.jsonl; see :func:`read_rows`."""
    return read_rows(RunDirectory(Path(run_dir)).metrics)


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The rows of a metrics file; none if it is missing.

    A last line without its end is left out: a crash cut it off, or the run is writing it.

    Raises:
        UserError: naming a line that is not a JSON object with a step.
    """
    if not path.is_file():
        return []
    *lines, _ = path.read_bytes().split(b"\n")
    rows = []
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise UserError(f"{path}, line {number} is not what was written ({error}); remove it") from error
        if not isinstance(row, dict) or not isinstance(row.get("step"), int):
            raise UserError(f"{path}, line {number} is not what was written (no object with a whole step); remove it")
        rows.append(row)
    return rows
