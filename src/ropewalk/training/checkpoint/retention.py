"""Retention: old checkpoints are deleted; only committed, whole ones, and never the newest of those."""

from __future__ import annotations

import shutil
from pathlib import Path

from ropewalk.files import fsync_path, inside
from ropewalk.runs.directory import MANIFEST, RunDirectory, read_manifest


def prune_checkpoints(run_dir: Path, keep_last: int | None, keep_every: int | None) -> list[Path]:
    """Delete the checkpoints that are not kept; call it on one rank, after a save.

    Kept are the newest ``keep_last`` (at least 1), and those whose step is a multiple of ``keep_every``. A checkpoint
    with a file missing or of another size is left for a person to look at and does not count. The manifest goes first,
    so a death in between leaves a directory that nothing takes for a checkpoint; such directories before the newest
    checkpoint are removed too, and universal forms of checkpoints before it or of the one that the run started from.

    Args:
        run_dir: the run's directory.
        keep_last: None: nothing is deleted.
        keep_every: steps; None: none but the last.

    Returns:
        The directories that are gone.
    """
    if keep_last is None:
        return []
    run = RunDirectory(run_dir)
    steps = run.saved_checkpoints()
    whole = [path for path in steps if _is_whole(path)]
    kept = set(whole[-max(keep_last, 1) :])
    if keep_every is not None:
        kept |= {path for path in whole if int(read_manifest(path)["step"]) % keep_every == 0}
    torn = [path for path in steps if not (path / MANIFEST).exists() and whole and path < whole[-1]]
    universal = [path for path, source in run.universal_forms() if whole and source < whole[-1]]
    started = [path for path in run.start.glob(f"{run.start_universal.name}*") if whole]
    expendable = sorted([*(path for path in whole if path not in kept), *torn, *universal, *started])
    for path in expendable:
        (path / MANIFEST).unlink(missing_ok=True)
        fsync_path(path)
        shutil.rmtree(path)
    return expendable


def _is_whole(checkpoint: Path) -> bool:
    """Committed, and every file there with its size; hashing all of it at every save would take too long."""
    try:
        files = read_manifest(checkpoint)["files"]
    except (ValueError, KeyError, OSError):  # none, or damaged
        return False
    paths = {inside(checkpoint, name): entry["bytes"] for name, entry in files.items()}
    return all(path.is_file() and path.stat().st_size == size for path, size in paths.items())
