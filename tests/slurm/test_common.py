"""The functions of slurm/common.sh that need no SLURM, in a real shell."""

import subprocess

import pytest


def shell(script: str, **variables: str) -> list[str]:
    done = subprocess.run(
        ["bash", "-c", f"set -euo pipefail\n. slurm/common.sh\n{script}", "script", "+experiment=x", "a=b c"],
        capture_output=True, text=True, check=False, env={"PATH": "/usr/bin:/bin", **variables},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


@pytest.mark.parametrize(("given", "expected"), [
    ("", "+experiment=cope20|a=1"),
    ("+experiment=rope", "a=1|+experiment=rope"),
])  # fmt: skip
def test_a_default_gives_way_to_what_is_said(given, expected):
    script = f'with_default +experiment=cope20 a=1 {given}; (IFS="|"; echo "${{arguments[*]}}")'
    assert shell(script) == [expected]


def test_the_cluster_group_is_trainings_alone():
    script = (
        "without_cluster cluster=x a=cluster cluster.name=y clusters=1 ++cluster.slurm.time=3; echo ${arguments[*]}"
    )
    assert shell(script) == ["a=cluster clusters=1"]


def test_ranks_run_in_the_container_under_srun():
    script = """
container=(apptainer exec --nv image.sif) srun_options=(--container-image=x)
ranks RECORD train.py "$@"; printf '%s\\n' "${line[@]}" """
    assert shell(script, SLURM_CPUS_PER_TASK="12") == [
        "srun", "--kill-on-bad-exit=0", "--wait=300", "--cpus-per-task=12", "--container-image=x",
        "apptainer", "exec", "--nv", "image.sif",
        "python", "-u", "-m", "ropewalk.cluster.slurm.rank", "RECORD", "train.py", "+experiment=x", "a=b c",
    ]  # fmt: skip


def test_gpus_are_bound_to_no_task():
    """Each rank takes its own, and sees the others for NVLink, whatever SLURM_GPU_BIND a site sets."""
    script = """ranks RECORD train.py; printf '%s\\n' "${line[@]}" """
    assert "--gpu-bind=none" in shell(script, SLURM_GPUS_ON_NODE="8")
    assert "--gpu-bind=none" not in shell(script)


def test_what_runs_once_is_in_the_container_too():
    assert shell("container=(echo in); once python x 'a b'") == ["in python x a b"]


def test_what_srun_runs_once_knows_the_tasks_of_the_whole_job():
    script = """
srun() { while [[ $1 == --* ]]; do shift; done; SLURM_NTASKS=1 "$@"; }
srun_options=(--container-image=x)
once bash -c 'echo "$SLURM_NTASKS $1"' bash 'a b'"""
    assert shell(script, SLURM_NTASKS="64") == ["64 a b"]


@pytest.mark.parametrize(("code", "terminated", "reason", "answer"), [
    (75, "", "None", "requeue"), (75, "1", "TimeLimit", "requeue"),
    (75, "1", "None", "stop"), (137, "", "None", "stop"),
])  # fmt: skip
def test_an_end_that_python_cannot_judge(code, terminated, reason, answer):
    script = 'code=$CODE terminated=$TERMINATED shown="JobState=X Reason=$REASON Dependency="; judged_here'
    (said,) = shell(script, CODE=str(code), TERMINATED=terminated, REASON=reason)
    assert said.split()[0] == answer


@pytest.mark.parametrize("answer", ["stop done", "requeue saved, to go on"])
def test_a_job_of_a_sweep_trains_its_combination_and_tells_its_end(answer):
    """The line below sweep_task is not reached."""
    script = """
once() { if [ "$4" = overrides ]; then echo "a=1 'b=c d'"; else (IFS='|'; echo "$*|"); fi; }
train() { (IFS='|'; echo "$*"); answer=$ANSWER; exit 0; }
sweep_task FOLDER
echo never"""
    end = f"python|-m|ropewalk.cluster.slurm.sweep|end|FOLDER|0|{answer}|"
    assert shell(script, ANSWER=answer) == ["a=1|b=c d", end]


@pytest.mark.parametrize(("terminated", "answer"), [
    ("", ""), ("1", "requeued, perhaps: SLURM ended it before its ranks began"),
])  # fmt: skip
def test_a_job_of_a_sweep_that_cannot_begin_tells_it(terminated, answer):
    """Where SLURM ended it, it may come back."""
    script = """
once() { if [ "$4" = overrides ]; then return 1; else (IFS='|'; echo "$*|"); fi; }
terminated=$TERMINATED
(sweep_task FOLDER) || echo "$?" """
    end = f"python|-m|ropewalk.cluster.slurm.sweep|end|FOLDER|1|{answer}|"
    assert shell(script, TERMINATED=terminated) == [end, "1"]
