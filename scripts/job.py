"""What the job scripts in slurm/ ask: the record of a job before its ranks start, and the options to submit it with.

``python scripts/job.py begin COMMAND [overrides] <BATCH_SCRIPT``, inside a job
``python scripts/job.py options [cluster=NAME] [nodes=N] [lead_seconds=N]``, before sbatch
``python scripts/job.py directory COMMAND [overrides]``: where a command would write, for the next one to read
``python scripts/job.py preview BATCH_SCRIPT [overrides]``: what a training job would be; DRY_RUN=1 BATCH_SCRIPT does it
"""

from __future__ import annotations

import os
import shlex
import sys
import tempfile
from pathlib import Path

from ropewalk.cli import composed, entry, run_command, user_errors
from ropewalk.cluster.slurm.job import begin
from ropewalk.cluster.slurm.options import exports, preview_of, sbatch_options
from ropewalk.config.rules import validate_train
from ropewalk.config.train import SbatchConfig


@entry("sbatch")
def options(config: SbatchConfig) -> None:
    """Print sbatch options for a cluster: sbatch $(python scripts/job.py options cluster=h100_8 nodes=4) ..."""
    print(*sbatch_options(config.cluster, config.nodes, config.lead_seconds), sep="\n")  # as they are, one a line


def begin_job() -> None:
    """Write the record of a job into its run directory and print what its script goes on with."""
    if len(sys.argv) < 2 or "SLURM_JOB_ID" not in os.environ:
        sys.exit(
            "error: begin COMMAND [overrides] <BATCH_SCRIPT is for a job's script; submit one of slurm/ with sbatch"
        )
    command, *arguments = sys.argv[1:]
    with user_errors():
        config = composed(command, _of_command(command, arguments))
        cluster = composed("sbatch", list(filter(_is_of_cluster, arguments))).cluster
        if command == "train":
            validate_train(config, int(os.environ.get("SLURM_NTASKS", "1")))
        lines = exports(cluster.slurm.environment)
    with tempfile.NamedTemporaryFile("w", suffix=".sh") as script:
        script.write(sys.stdin.read())
        script.flush()
        record = begin(command, config, arguments, Path(script.name), os.environ)
    print(f"job_record={shlex.quote(str(record))}", f"scratch={shlex.quote(cluster.slurm.scratch)}", *lines, sep="\n")


def directory() -> None:
    """Print the directory that a command would write with these overrides, after checking that they compose."""
    if len(sys.argv) < 2:
        sys.exit("error: say whose directory: python scripts/job.py directory train +experiment=cope20")
    command, *arguments = sys.argv[1:]
    with user_errors():
        config = composed(command, _of_command(command, arguments))
    print(config.run_dir if command == "train" else config.output)


def preview() -> None:
    """Print what a training job would be: what its overrides change, the plan for its cluster, the sbatch line."""
    if len(sys.argv) < 2:
        sys.exit("error: say which job: python scripts/job.py preview slurm/train_64k.sh +experiment=cope20")
    batch_script, *arguments = sys.argv[1:]
    with user_errors():
        lines, is_ready = preview_of(batch_script, arguments, composed)
        print("\n".join(lines))
    sys.exit(0 if is_ready else 1)


def _is_of_cluster(word: str) -> bool:
    return word.partition("=")[0].lstrip("+~").split(".")[0] == "cluster"


def _of_command(command: str, arguments: list[str]) -> list[str]:
    """Without the cluster group, which training alone has."""
    return arguments if command == "train" else [word for word in arguments if not _is_of_cluster(word)]


if __name__ == "__main__":
    run_command({"begin": begin_job, "options": options, "directory": directory, "preview": preview})
