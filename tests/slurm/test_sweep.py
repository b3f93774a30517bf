"""A job of hydra/launcher=slurm, between the launcher's file and the launcher's wait; the launcher is the real one."""

import os
import shlex
import subprocess
import sys
import time

import pytest
from helpers import composed

from ropewalk.cluster.slurm import sweep
from ropewalk.config import CONFIG_DIR

ROOT = CONFIG_DIR.parent
SBATCH = """#!/bin/sh
cp "$1" "$0.partial" && mv "$0.partial" "$(dirname "$0")/submitted.sh"
echo Submitted batch job 77
"""


@pytest.fixture
def launched(tmp_path):
    """A launcher that has submitted two combinations to an sbatch that only takes a number, and waits for them."""
    for name, text in {"sbatch": SBATCH, "srun": "#!/bin/sh\nexit 1\n"}.items():
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    words = [
        "hydra/launcher=slurm", "+experiment=demo/pretrain", "cluster=laptop", "trainer.seed=3,5",
        "run_name='it is/seed${trainer.seed}'", f"hydra.sweep.dir={tmp_path}/a sweep",
    ]  # fmt: skip
    process = subprocess.Popen(
        [sys.executable, "train.py", "-m", *words], text=True, stderr=subprocess.PIPE,
        env={**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}", "PYTHONPATH": str(ROOT / "src")},
    )  # fmt: skip
    until = time.monotonic() + 300
    while process.poll() is None and not (tmp_path / "submitted.sh").exists() and time.monotonic() < until:
        time.sleep(0.05)
    assert (tmp_path / "submitted.sh").exists(), process.poll() is None or process.communicate()[1]
    yield process, tmp_path
    if process.poll() is None:
        process.kill()
    process.communicate()


def in_job(monkeypatch, task):
    monkeypatch.setenv("SLURM_ARRAY_JOB_ID", "77")
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", str(task))
    monkeypatch.setenv("SLURM_JOB_ID", str(77 + task))
    monkeypatch.setenv("SLURM_NTASKS", "1")


def test_the_launcher_waits_until_each_job_has_ended_for_good(launched, monkeypatch):
    process, place = launched
    folder = f"{place}/a sweep/submitit/%j"
    script = (place / "submitted.sh").read_text()
    assert f"\ncd {shlex.quote(os.getcwd())}\n" in script
    assert [line for line in script.splitlines() if "--signal" in line] == ["#SBATCH --signal=B:USR1@40"]
    assert f"\nsweep_task '{folder}'\n" in script
    for task, seed in enumerate((3, 5)):
        in_job(monkeypatch, task)
        config = composed("train", *sweep.overrides(folder))
        assert (config.trainer.seed, config.run_name) == (seed, f"it is/seed{seed}")
    in_job(monkeypatch, 0)
    for answer in ("requeue saved, to go on", "requeued SLURM has put the job back into the queue itself"):
        sweep.end(folder, 75, answer)
    assert not list(place.glob("a sweep/submitit/*/*result*"))
    sweep.end(folder, 0, "stop done")
    assert process.poll() is None
    in_job(monkeypatch, 1)
    sweep.end(folder, 3, "stop the doctor found the machine unfit")
    said = process.communicate(timeout=60)[1]
    assert process.returncode == 1
    assert "trainer.seed=5" in said
    log = f"{place}/a sweep/submitit/77_1/77_1_0_log.out"
    assert said.endswith(f"error: job 77_1 ended with 3: the doctor found the machine unfit; its log: {log}\n")


def test_a_launcher_away_from_the_repository_submits_nothing(tmp_path):
    """Its jobs would find neither their scripts nor their paths."""
    (tmp_path / "sbatch").write_text(SBATCH)
    (tmp_path / "sbatch").chmod(0o755)
    done = subprocess.run(
        [sys.executable, ROOT / "train.py", "-m", "hydra/launcher=slurm", "cluster=laptop", "run_name=x"],
        cwd=tmp_path, capture_output=True, text=True, check=False,
        env={**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}", "PYTHONPATH": str(ROOT / "src")},
    )  # fmt: skip
    assert done.returncode == 2
    assert f"was started in {tmp_path}; start it in the root of the repository" in done.stderr
    assert not (tmp_path / "submitted.sh").exists()


def test_a_file_that_no_node_sees_is_told(tmp_path, monkeypatch):
    in_job(monkeypatch, 0)
    with pytest.raises(ValueError, match=r"hydra\.sweep\.dir on a disk that all nodes see"):
        sweep.overrides(f"{tmp_path}/%j", seconds=0)
