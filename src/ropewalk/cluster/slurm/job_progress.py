"""How far a job's work has got, so that a session that got nothing on is told from one that did."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ropewalk.runs.directory import RunDirectory

SHARED_STAGES = ("tokenize", "pack")  # of a preparation: tasks of an array write into one directory


def work_of(command: str, config: Any) -> dict[str, Any]:
    """The work of a job, for its record and for :func:`progress_of`.

    Args:
        command: train, evaluate, ...: which configuration ``config`` is.
        config: resolved.
    """
    if command == "train":
        return {"kind": "steps", "path": str(config.run_dir)}
    if command == "prepare" and config.stage in SHARED_STAGES:
        share = {"stage": config.stage, "shard": config.shard, "n_shards": config.n_shards}
        return {"kind": "share", "path": str(config.output), **share}
    return {"kind": "file" if command == "compare" else "files", "path": str(config.output)}


def progress_of(kind: str, path: str | Path, **share: Any) -> int | None:
    """A number that changes when the work of one job has got on, and not when another's has.

    Args:
        kind: "steps": of the newest committed checkpoint, None before the first. "files": results in a directory; it
            grows with each finished cell of an evaluation. "file": when the one result was written (ns since 1970),
            None before. "share": the finished tasks of one share of a preparation.
        path: run directory, output directory or output file.
        share: of a preparation: stage, shard and n_shards.
    """
    path = Path(path)
    if kind == "steps":
        return RunDirectory(path).committed_step()
    if kind == "share":
        return _finished_tasks(path, **share)
    if kind == "file":
        return path.stat().st_mtime_ns if path.is_file() else None
    return sum(file.suffix in (".json", ".parquet") for file in path.rglob("*"))


def got_on(kind: str, before: int | None, now: int | None) -> bool:
    """True if two answers of :func:`progress_of` say that something was done between them.

    A newest checkpoint that is damaged and put aside leaves an earlier one, and an engine that a neighbour has found to
    differ leaves fewer finished tasks: neither is progress.
    """
    if kind in ("steps", "share"):
        return now is not None and now > (before or 0)
    return now != before


def _finished_tasks(output: Path, stage: str, shard: int, n_shards: int) -> int:
    from ropewalk.data.prepare.prepare_plan import Plan
    from ropewalk.data.prepare.stages import Pack, Tokenize

    try:
        plan = Plan.load(output)
        tasks = Tokenize(plan) if stage == "tokenize" else Pack.of(plan)
    except ValueError:  # no plan yet, or not all is tokenized: the stage itself says so, and ends
        return 0
    return sum(map(tasks.finished, range(shard, len(tasks), n_shards)))
