"""The record of a job: what it was made of before the ranks start, how far it got, and how it ended."""

from __future__ import annotations

import argparse
import json
import platform
import shlex
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from ropewalk.cluster.slurm.verdict import Verdict, ending_of, judge
from ropewalk.files import write_atomically
from ropewalk.runs.directory import JobRecord, RunDirectory
from ropewalk.runs.record import (
    git_changes,
    git_commit,
    masked,
    recorded_arguments,
    recorded_config,
    recorded_environment,
    secrets_in,
    versions,
)

SHARED_STAGES = ("tokenize", "pack")  # of a preparation: tasks of an array write into one directory


def jobs_directory(command: str, config: Any, job_name: str) -> Path:
    """Directory of a command's job records: in the run directory of a training, else below the output directory."""
    if command == "train":
        return RunDirectory(Path(config.run_dir)).jobs
    return Path(config.paths.output_dir) / "jobs" / job_name


def begin(
    command: str, config: Any, arguments: Sequence[str], batch_script: Path, environment: Mapping[str, str]
) -> Path:
    """Write what the job is made of; returns its directory, ``<jobs>/<job id>-<restart>``.

    Args:
        command: train, evaluate, ...: which configuration ``config`` is.
        config: resolved.
        arguments: of the command line; keys and tokens for the cluster's environment are masked.
        batch_script: what SLURM runs, a copy in its spool.
        environment: of the job; keys and tokens in it are not written.
    """
    job, restart = environment["SLURM_JOB_ID"], int(environment.get("SLURM_RESTART_COUNT", "0"))
    jobs = jobs_directory(command, config, environment.get("SLURM_JOB_NAME", "job"))
    record = JobRecord(jobs / f"{job}-{restart}")
    record.root.mkdir(parents=True, exist_ok=True)
    _close_abandoned(jobs, job, restart)
    cluster = config.cluster.slurm.environment if command == "train" else {}
    secrets = secrets_in(environment) | secrets_in(cluster)
    work = work_of(command, config)
    write_atomically(record.script, masked(batch_script.read_text(errors="replace"), secrets))
    write_atomically(record.changes, git_changes(secrets))
    write_atomically(record.config, OmegaConf.to_yaml(OmegaConf.create(recorded_config(config))))
    content = {
        "command": shlex.join([command, *recorded_arguments(arguments)]),
        "job_id": job,
        "job_name": environment.get("SLURM_JOB_NAME"),
        "array": environment.get("SLURM_ARRAY_JOB_ID") and [
            environment["SLURM_ARRAY_JOB_ID"], environment.get("SLURM_ARRAY_TASK_ID")
        ],
        "restart": restart,
        "partition": environment.get("SLURM_JOB_PARTITION"),
        "account": environment.get("SLURM_JOB_ACCOUNT"),
        "nodes": environment.get("SLURM_JOB_NODELIST"),
        "tasks": int(environment.get("SLURM_NTASKS", "1")),
        "started": time.time(),
        "work": work,
        "progress": progress_of(**work),
        "git_commit": git_commit(),
        "python": platform.python_version(),
        "versions": versions(),
        "environment": recorded_environment(environment),
    }  # fmt: skip
    write_atomically(record.begin, json.dumps(content, indent=2) + "\n")
    return record.root


def end(record: Path, code: int, *, warned: bool = False, terminated: bool = False, shown: str = "") -> Verdict:
    """Judge how the ranks ended and write it down, in the words of sacct.

    Args:
        record: what :func:`begin` returned.
        code: srun's exit code.
        warned: the batch script got SIGUSR1.
        terminated: the batch script got SIGTERM.
        shown: what ``scontrol --oneliner show job`` says of the job now.
    """
    session = JobRecord(record)
    begun = json.loads(session.begin.read_text(encoding="utf-8"))
    ranks = [json.loads(path.read_text(encoding="utf-8")) for path in session.rank_notes()]
    now = progress_of(**begun["work"])
    verdict = judge(
        code, ranks, begun["tasks"], warned=warned,
        ending=ending_of(shown, begun["restart"], terminated=terminated), progress=_has_progress(begun, now),
        fruitless=_fruitless_before(session),
    )  # fmt: skip
    _write_end(session, begun, verdict.state, f"{code}:0", verdict.reason, now, ranks)
    return verdict


def _has_progress(begun: Mapping[str, Any], now: int | None) -> bool:
    return has_advanced(begun["work"]["kind"], begun["progress"], now)


def _write_end(
    record: JobRecord,
    begun: Mapping[str, Any],
    state: str,
    exit_code: str | None,
    reason: str,
    progress: int | None,
    ranks: Sequence[Mapping[str, Any]],
) -> None:
    now = time.time()
    steps = (begun["progress"], progress) if begun["work"]["kind"] == "steps" else (None, None)
    content = {
        "JobID": begun["job_id"],
        "JobName": begun["job_name"],
        "Partition": begun["partition"],
        "Account": begun["account"],
        "NodeList": begun["nodes"],
        "NTasks": begun["tasks"],
        "Restarts": begun["restart"],
        "Start": _sacct_time(begun["started"]),
        "End": _sacct_time(now),
        "Elapsed": _elapsed(now - begun["started"]),
        "State": state,
        "ExitCode": exit_code,
        "Reason": reason,
        "CommittedStepBefore": steps[0],
        "CommittedStep": steps[1],
        "Progress": _has_progress(begun, progress),
        "Ranks": [{key: rank.get(key) for key in ("rank", "node", "code", "error")} for rank in ranks],
    }
    write_atomically(record.end, json.dumps(content, indent=2) + "\n")


def _close_abandoned(jobs: Path, job: str, restart: int) -> None:
    """Write an end for earlier sessions of this job that had none to write: their node died."""
    for number in range(restart):
        record = JobRecord(jobs / f"{job}-{number}")
        if record.begin.is_file() and not record.end.exists():
            begun = json.loads(record.begin.read_text(encoding="utf-8"))
            reason = "no end was written: the node died or SLURM ended it"
            _write_end(record, begun, "NODE_FAIL", None, reason, progress_of(**begun["work"]), [])


def _fruitless_before(record: JobRecord) -> int:
    """Sessions right before this one that went back into the queue, for whatever reason, without progress."""
    job, _, restart = record.root.name.rpartition("-")
    count = 0
    for number in reversed(range(int(restart))):
        path = JobRecord(record.root.with_name(f"{job}-{number}")).end
        ended = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
        if ended.get("State") not in ("REQUEUED", "NODE_FAIL") or ended.get("Progress"):
            break
        count += 1
    return count


def _sacct_time(seconds: float) -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%S", time.localtime(seconds))


def _elapsed(seconds: float) -> str:
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    days, hour = divmod(hours, 24)
    return (f"{days}-" if days else "") + f"{hour:02d}:{minute:02d}:{second:02d}"


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
    """A number that changes when the work of one job has advanced, and not when another's has.

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


def has_advanced(kind: str, earlier: int | None, now: int | None) -> bool:
    """True if two values of :func:`progress_of` show that something was done between them.

    A newest checkpoint that is damaged and put aside leaves an earlier one, and an engine that a neighbour has found to
    differ leaves fewer finished tasks: neither is progress.
    """
    if kind in ("steps", "share"):
        return now is not None and now > (earlier or 0)
    return now != earlier


def _finished_tasks(output: Path, stage: str, shard: int, n_shards: int) -> int:
    from ropewalk.data.prepare.prepare_plan import Plan
    from ropewalk.data.prepare.stages import Pack, Tokenize

    try:
        plan = Plan.load(output)
        tasks = Tokenize(plan) if stage == "tokenize" else Pack.of(plan)
    except ValueError:  # no plan yet, or not all is tokenized: the stage itself reports that, and ends
        return 0
    return sum(map(tasks.finished, range(shard, len(tasks), n_shards)))


def main() -> None:
    """``python -m ropewalk.cluster.slurm.job end RECORD CODE ...``: whether the job comes back, and why, in a line.

    Its first word: "requeue" where it has to put itself back, "requeued" where SLURM does, "stop" where it stays ended.
    """
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("action", choices=["end"])
    parser.add_argument("record", type=Path)
    parser.add_argument("code", type=int)
    parser.add_argument("--warned", action="store_true")
    parser.add_argument("--terminated", action="store_true")
    parser.add_argument("--shown", default="")
    given = parser.parse_args()
    verdict = end(given.record, given.code, warned=given.warned, terminated=given.terminated, shown=given.shown)
    back = "requeue" if verdict.requeue else "requeued" if verdict.state == "REQUEUED" else "stop"
    print(f"{back} {verdict.reason}")


if __name__ == "__main__":
    main()
