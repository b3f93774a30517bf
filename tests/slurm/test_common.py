"""The functions of slurm/common.sh that need no SLURM, in a real shell."""

import re
import subprocess

import pytest

from ropewalk.entry import CONFIG_DIR

ROOT = CONFIG_DIR.parent


def shell(script: str, **variables: str) -> list[str]:
    done = subprocess.run(
        ["bash", "-c", f"set -euo pipefail\n. slurm/common.sh\n{script}", "script", "+experiment=x", "a=b c"],
        cwd=ROOT, capture_output=True, text=True, check=False, timeout=60, env={"PATH": "/usr/bin:/bin", **variables},
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
        "python", "-u", "-m", "ropewalk.slurm.rank", "RECORD", "train.py", "+experiment=x", "a=b c",
    ]  # fmt: skip


def test_what_runs_once_is_in_the_container_too():
    assert shell("container=(echo in); once python x 'a b'") == ["in python x a b"]


@pytest.mark.parametrize(("job", "signal"), [("train_64k", "USR1"), ("evaluate", "TERM")])
def test_a_warning_ends_the_ranks_of_every_job_that_comes_back(tmp_path, job, signal):
    """The ranks of an evaluation never listen to SIGUSR1. Here srun is a process that ends by either signal."""
    source = (ROOT / "slurm" / f"{job}.sh").read_text()
    assert {"signal", "requeue"} <= set(re.findall(r"^#SBATCH --([a-z-]+)", source, re.MULTILINE))
    (tmp_path / "ranks").mkdir()
    srun = tmp_path / "srun"
    srun.write_text(
        "#!/usr/bin/env bash\ntrap 'echo got USR1; exit 75' USR1\ntrap 'echo got TERM; exit 143' TERM\n"
        f"touch {tmp_path}/ranks/rank-00000.json\nkill -USR1 $PPID\nwhile :; do sleep 0.1; done\n"
    )
    srun.chmod(0o755)
    chosen = "".join(re.findall(r"^on_warning=.*$", source, re.MULTILINE))
    script = f"{chosen}\ntrap 'warned=1' USR1\njob_record={tmp_path}\nrun_ranks scripts/x.py\necho $code $warned"
    said = shell(script, PATH=f"{tmp_path}:/usr/bin:/bin", SLURM_NTASKS="1")
    assert said[1:] == [f"got {signal}", "75 1" if signal == "USR1" else "143 1"]
