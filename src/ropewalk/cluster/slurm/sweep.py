"""One job of ``train.py -m hydra/launcher=slurm``, run by slurm/common.sh as every other training job.

Submitit leaves a file for each job with what is to be called there, and waits for a file with the result. Its own
process on the nodes would skip the doctor, the record and the verdict. So the batch script reads the job's overrides
here, trains with them as slurm/train_64k.sh does, and has the result written once the job has ended for good.

``python -m ropewalk.cluster.slurm.sweep overrides FOLDER``: prints them, quoted for the shell
``python -m ropewalk.cluster.slurm.sweep end FOLDER CODE ANSWER``: see :func:`end`
"""

from __future__ import annotations

import argparse
import os
import shlex
import sys
import time

from hydra.core.utils import JobReturn, JobStatus
from submitit.core.utils import DelayedSubmission, JobPaths, cloudpickle_dump
from submitit.slurm.slurm import SlurmJobEnvironment

from ropewalk.errors import UserError
from ropewalk.files import replace_atomically

SECONDS_TO_SUBMIT = 60  # in which the launcher has put its file where the job looks for it


def overrides(folder: str, seconds: float = SECONDS_TO_SUBMIT) -> list[str]:
    """The overrides of this job, one combination of the sweep, as train.py takes them.

    Args:
        folder: the launcher's ``submitit_folder``.
        seconds: how long to wait for the launcher's file.

    Raises:
        UserError: where it has not come.
    """
    path = JobPaths(folder, job_id=SlurmJobEnvironment().job_id).submitted_pickle
    until = time.monotonic() + seconds
    while not path.exists():
        if time.monotonic() > until:
            raise UserError(f"{path} has not come in {seconds:.0f} s; put hydra.sweep.dir on a disk that all nodes see")
        time.sleep(min(1.0, seconds))
    return list(DelayedSubmission.load(path).args[0])


def end(folder: str, code: int, answer: str) -> None:
    """Report to the launcher how this job has ended, unless it goes on later.

    Args:
        folder: the launcher's ``submitit_folder``.
        code: exit code of the batch script.
        answer: of ``ropewalk.cluster.slurm.job end``; "" where it ended before its ranks.
    """
    if answer.startswith("requeue"):  # and "requeued"
        return
    job = SlurmJobEnvironment().job_id
    try:
        combination = overrides(folder, seconds=0)
    except ValueError:  # they were the reason of its end
        combination = []
    result = JobReturn(overrides=combination, status=JobStatus.COMPLETED)
    if code != 0:
        reason = answer.removeprefix("stop ") or "it ended before its ranks began"
        result.status = JobStatus.FAILED
        # An exception that Hydra does not print itself; without a traceback, as none would show anything.
        result.return_value = SystemExit(
            f"error: job {job} ended with {code}: {reason}; its log: {JobPaths(folder, job_id=job).stdout}"
        )
    for task in range(int(os.environ.get("SLURM_NTASKS", "1"))):  # the launcher waits for every one
        path = JobPaths(folder, job_id=job, task_id=task).result_pickle
        replace_atomically(path, lambda partial: cloudpickle_dump(("success", result), partial))


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("overrides").add_argument("folder")
    ending = commands.add_parser("end")
    ending.add_argument("folder")
    ending.add_argument("code", type=int)
    ending.add_argument("answer")
    arguments = parser.parse_args()
    if arguments.command == "end":
        end(arguments.folder, arguments.code, arguments.answer)
        return
    try:
        print(shlex.join(overrides(arguments.folder)))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
