"""What slurm/chain.sh submits, and that it submits nothing where a stage could not be; sbatch is a recorder."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import alone_environment

from ropewalk.entry import CONFIG_DIR

ROOT = CONFIG_DIR.parent
SBATCH = '#!/usr/bin/env bash\nprintf "%s\\t" "$@" >>"$SUBMITTED"\necho >>"$SUBMITTED"\nwc -l <"$SUBMITTED"\n'
pytestmark = pytest.mark.slow


def chain(tmp_path: Path, *words: str) -> tuple[subprocess.CompletedProcess[str], list[list[str]]]:
    """The script's end, and the words of each sbatch; a job's number is its place among them."""
    (tmp_path / "sbatch").write_text(SBATCH)
    (tmp_path / "sbatch").chmod(0o755)
    path = f"{tmp_path}:{Path(sys.executable).parent}:{os.environ['PATH']}"
    environment = {**alone_environment(), "PATH": path, "SUBMITTED": str(tmp_path / "words")}
    done = subprocess.run(
        ["slurm/chain.sh", *words], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    submitted = tmp_path / "words"
    lines = submitted.read_text().splitlines() if submitted.exists() else []
    return done, [line.split("\t")[:-1] for line in lines]


@pytest.mark.parametrize(("words", "said"), [
    (["prepare=4 corpus=typo sequence_lengths=[65536]"], "typo"),
    (["nodes=four"], "four"),
    (["nodes=6"], "48"),  # ranks among which a batch of 64 cannot be shared
    (["train=trainer.max_stepz=1"], "max_stepz"),
    (["evaluate=documents=x lengthz=[1]"], "lengthz"),
])  # fmt: skip
def test_what_does_not_compose_submits_nothing(tmp_path, words, said):
    done, submitted = chain(tmp_path, *words)
    assert done.returncode != 0
    assert said in done.stderr
    assert submitted == []


def test_every_job_waits_for_the_one_before(tmp_path):
    constraint = 'cluster.slurm.constraint="h100&ib"'  # quoted for Hydra; the shell must leave it alone
    done, submitted = chain(
        tmp_path, "arms=rope", "nodes=4", "prepare=2 corpus=files sequence_lengths=[65536]", f"train={constraint}"
    )
    assert done.returncode == 0, done.stderr
    scripts = [next(word for word in words if word.startswith("slurm/")) for words in submitted]
    stage = "slurm/prepare_stage.sh"
    assert scripts == [stage] * 4 + [f"slurm/{name}.sh" for name in ("train_64k", "sft_64k", "evaluate", "compare")]
    waits = [[word for word in words if word.startswith("--dependency=")] for words in submitted]
    assert waits == [[], *([f"--dependency=afterok:{number}"] for number in range(1, 8))]
    assert all("--kill-on-invalid-dep=yes" in words for words in submitted)
    assert constraint in submitted[4]
    assert {"--nodes=4", "--ntasks-per-node=8"} <= set(submitted[4])


def test_options_are_words_as_they_are():
    command = [sys.executable, "scripts/job.py", "options", 'cluster.slurm.constraint="h100&ib|[a-b]"', "nodes=4"]
    said = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.splitlines()
    assert "--constraint=h100&ib|[a-b]" in said
    assert "--nodes=4" in said
