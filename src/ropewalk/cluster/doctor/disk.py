"""The file system under a run: atomic rename, fsync, clocks, locks and room, which committed checkpoints rest on."""

from __future__ import annotations

import fcntl
import os
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

from ropewalk.cluster.doctor.screen import Finding, fail, ok, warn
from ropewalk.files import fsync_path, write_atomically
from ropewalk.runs.directory import RunDirectory

FP32_STATES = 12  # bytes a parameter of a checkpoint: master weights and Adam's two moments
SKEW = 5.0  # seconds between a clock and another that nothing minds
SLOW_FSYNC = 1.0  # seconds for a file of a few bytes
GB = 1e9


def check_file_system(directory: Path) -> Iterator[Finding]:
    """Rename over a file, fsync, the time that files get, and flock, in ``directory``."""
    place = directory / f".doctor-{os.uname().nodename}-{os.getpid()}"
    place.mkdir()
    try:
        file = place / "file"
        before = time.monotonic()
        write_atomically(file, "one")
        write_atomically(file, "two")
        fsync_path(place)
        seconds = (time.monotonic() - before) / 2
        names = sorted(path.name for path in place.iterdir())
        if file.read_text() != "two" or names != ["file"]:
            yield fail(
                "file system", f"a rename over a file left {names} in {place}; checkpoints could not be committed"
            )
        elif seconds > SLOW_FSYNC:
            yield warn(
                "file system", f"rename and fsync take {seconds:.1f} s a file in {directory}; saving will be slow"
            )
        else:
            yield ok("file system", f"rename is atomic, fsync works in {directory}")
        yield from _check_time(file)
        yield from _check_lock(file)
    finally:
        shutil.rmtree(place)


def _check_time(file: Path) -> Iterator[Finding]:
    file.touch()
    skew = file.stat().st_mtime - time.time()
    if abs(skew) > SKEW:
        yield warn("clock", f"files get a time {skew:+.0f} s off this node's clock; have both follow one NTP server")


def _check_lock(file: Path) -> Iterator[Finding]:
    """A lock held by one descriptor must refuse another one."""
    with file.open() as held, file.open() as other:
        try:
            fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            yield warn(
                "flock", f"not there ({error}); data.cache_dir must be on another disk than {file.parent.parent}"
            )
            return
        try:
            fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield ok("flock", "holds")
        else:
            yield warn("flock", f"does not exclude in {file.parent.parent}; data.cache_dir must be on another disk")


def check_space(directory: Path, parameters: int, checkpoints: int, steps: int) -> Iterator[Finding]:
    """Room for what a run has still to save: the checkpoints that it keeps and the one that is being written.

    Args:
        directory: of the run; what it holds already needs no more room.
        parameters: of the model.
        checkpoints: that stay.
        steps: of the whole run.
    """
    free = shutil.disk_usage(directory).free
    one = FP32_STATES * parameters
    run = RunDirectory(directory)
    there = len(run.committed_checkpoints())
    need = max(1, checkpoints + 1 - there) * one
    said = f"{free / GB:,.0f} GB free, {one / GB:,.1f} GB a checkpoint, {checkpoints} kept"
    said += f", {there} there: {need / GB:,.1f} GB"
    if run.committed_step() == steps:
        yield ok("space", f"{free / GB:,.0f} GB free; all steps are saved")
    elif free < (one if there else 2 * one):
        yield fail("space", f"{said}; free some, or set run_dir to another disk")
    elif free < need:
        yield warn("space", f"{said}; set trainer.keep_last=2, or free some before it is full")
    else:
        yield ok("space", said)


def make_directory(directory: Path) -> Path:
    """``directory``, made if it is missing.

    Raises:
        OSError: where it cannot be made, or is a file.
    """
    directory.mkdir(parents=True, exist_ok=True)
    return directory
